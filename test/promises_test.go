package test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What docs/review.md promises to those who read the source, as tests.

const apiPage = "../developers/api.md"

// maxLines counts all lines of Go outside tests, comments and blank ones too.
// One person is to read them with care in a day. To raise it is a decision: say
// why in the commit.
const maxLines = 7397

// A sourceFile is a Go file of the program, or a test, parsed.
type sourceFile struct {
	name string
	text string
	*ast.File
}

// goFiles parses the files of the program, or all tests.
func goFiles(t testing.TB, tests bool) (list []sourceFile) {
	t.Helper()
	names, _ := filepath.Glob("*.go")
	if tests {
		outside, _ := filepath.Glob("test/*.go")
		names = append(names, outside...)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") != tests {
			continue
		}
		text := readFile(t, name)
		file, err := parser.ParseFile(token.NewFileSet(), name, text, 0)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, sourceFile{name, text, file})
	}
	if len(list) == 0 {
		t.Fatal("found no source")
	}
	return list
}

func TestSourceCanBeReadInADay(t *testing.T) {
	total := 0
	for _, file := range goFiles(t, false) {
		total += strings.Count(file.text, "\n")
		for _, declared := range file.Decls {
			if f, ok := declared.(*ast.FuncDecl); ok { // positions count from 1, of each file by itself
				if n := strings.Count(file.text[f.Pos()-1:f.End()-1], "\n") + 1; n > 60 {
					t.Errorf("%s: %s has %d lines, want at most 60", file.name, f.Name.Name, n)
				}
			}
		}
	}
	if total > maxLines {
		t.Errorf("the source has %d lines, want at most %d", total, maxLines)
	}
}

// rooms are the files in the order of who may name what others declare: each
// only what stands below it. What everybody hangs on is nobody's room.
var rooms = strings.Fields(`
	main.go config.go discovery.go keeper.go evidence.go feed.go exchange.go token.go auth.go credential.go workload.go assertion.go dpop.go agent.go audit.go chain.go
	input.go http.go caller.go ratelimit.go metrics.go jwk.go jwt.go store.go errors.go`)

// passages are names that go against that order, and why.
var passages = map[string]string{
	"server":        "holds the two stores, the keys and what asks them: each room has its methods on it",
	"version":       "is on the first lines of main.go, where it is looked for, and health and metrics tell it",
	"recordRefusal": "a request that was refused is answered by http.go, and audit.go knows how to record it",
}

const maxRoom = 450 // lines, which is an hour's reading

func TestRoomsNameOnlyWhatIsBelowThem(t *testing.T) {
	home, method := map[string]int{}, map[string]int{} // the room of a name, and of a method of server
	files := goFiles(t, false)
	for _, file := range files {
		room := slices.Index(rooms, file.name)
		if n := strings.Count(file.text, "\n"); room < 0 || n > maxRoom {
			t.Errorf("%s has %d lines, and is room %d; want it listed, with at most %d", file.name, n, room, maxRoom)
		}
		types := map[string]bool{}
		for _, declared := range file.Decls {
			switch d := declared.(type) {
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						home[spec.Name.Name], types[spec.Name.Name] = room, true
					case *ast.ValueSpec:
						for _, name := range spec.Names {
							home[name.Name] = room
						}
					}
				}
			case *ast.FuncDecl:
				if d.Recv == nil {
					home[d.Name.Name] = room
				} else if receiver(d) == "server" {
					method[d.Name.Name] = room
				}
			}
		}
		for _, declared := range file.Decls {
			if d, ok := declared.(*ast.FuncDecl); ok && d.Recv != nil && receiver(d) != "server" && !types[receiver(d)] {
				t.Errorf("%s has the method %s of %s, which is another file's", file.name, d.Name.Name, receiver(d))
			}
		}
	}
	if len(files) != len(rooms) {
		t.Errorf("there are %d files, want the %d rooms", len(files), len(rooms))
	}
	passed := map[string]bool{}
	for _, file := range files {
		here := slices.Index(rooms, file.name)
		look := func(name string, declared map[string]int) {
			there, ours := declared[name]
			switch {
			case !ours || there >= here:
			case passages[name] != "":
				passed[name] = true
			default:
				t.Errorf("%s names %s, which %s above it declares", file.name, name, rooms[there])
			}
		}
		for _, name := range file.Unresolved { // by this file: it is another's, an import or Go's own
			look(name.Name, home)
		}
		ast.Inspect(file.File, func(n ast.Node) bool {
			if of, ok := n.(*ast.SelectorExpr); ok {
				if s, ok := of.X.(*ast.Ident); ok && s.Name == "s" {
					look(of.Sel.Name, method)
				}
			}
			return true
		})
	}
	for name := range passages {
		if !passed[name] {
			t.Errorf("nothing needs the passage of %s", name)
		}
	}
}

// receiver is the type that a method is of.
func receiver(method *ast.FuncDecl) string {
	of := method.Recv.List[0].Type
	if pointer, ok := of.(*ast.StarExpr); ok {
		of = pointer.X
	}
	if generic, ok := of.(*ast.IndexListExpr); ok {
		of = generic.X
	}
	if generic, ok := of.(*ast.IndexExpr); ok {
		of = generic.X
	}
	name, _ := of.(*ast.Ident)
	return name.Name
}

// importers says which files may import a package, or what is below it; "" is
// none. What is not listed here is for every file.
var importers = map[string]string{
	"crypto/ed25519":               "jwk.go",
	"crypto/rsa":                   "jwk.go jwt.go",
	"crypto/ecdsa":                 "jwk.go jwt.go",
	"crypto/elliptic":              "jwk.go jwt.go",
	"crypto/x509":                  "jwk.go jwt.go",
	"golang.org/x/crypto":          "credential.go",
	"os":                           "main.go config.go evidence.go",
	"embed":                        "discovery.go store.go",
	"github.com/redis/go-redis/v9": "config.go ratelimit.go",
	"unsafe":                       "",
	"reflect":                      "",
	"math/rand":                    "", // crypto/rand is for what nobody may guess
	"C":                            "",
}

// pureFiles may not import these: what they do has to be a function of what
// they are given.
var pureFiles = map[string][]string{
	"jwk.go": {"net/http", "github.com/jackc/pgx/v5", "github.com/redis/go-redis/v9", "os", "log/slog"},
	"jwt.go": {"net/http", "github.com/jackc/pgx/v5", "github.com/redis/go-redis/v9", "os", "log/slog"},
}

func TestImportsStayInTheirFiles(t *testing.T) {
	within := func(imported, parent string) bool {
		return imported == parent || strings.HasPrefix(imported, parent+"/")
	}
	for _, file := range goFiles(t, false) {
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			for parent, files := range importers {
				if within(imported, parent) && !slices.Contains(strings.Fields(files), file.name) {
					t.Errorf("%s imports %s, which is for %q", file.name, imported, files)
				}
			}
			for _, parent := range pureFiles[file.name] {
				if within(imported, parent) {
					t.Errorf("%s imports %s, want it free of that", file.name, imported)
				}
			}
		}
	}
}

func TestThereAreThreeDependencies(t *testing.T) {
	var direct []string
	for line := range strings.Lines(readFile(t, "go.mod")) {
		fields := strings.Fields(strings.TrimPrefix(line, "require "))
		if len(fields) == 2 && strings.HasPrefix(fields[1], "v") {
			direct = append(direct, fields[0])
		}
		if len(fields) > 0 && (fields[0] == "replace" || fields[0] == "tool") {
			t.Errorf("go.mod has %q", strings.TrimSpace(line))
		}
	}
	slices.Sort(direct)
	want := []string{"github.com/jackc/pgx/v5", "github.com/redis/go-redis/v9", "golang.org/x/crypto"}
	if !slices.Equal(direct, want) {
		t.Errorf("direct dependencies are %q, want %q", direct, want)
	}
}

// Nothing runs before main does.
func TestThereIsNoInit(t *testing.T) {
	for _, file := range goFiles(t, false) {
		for _, declared := range file.Decls {
			if f, ok := declared.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				t.Errorf("%s has an init function", file.name)
			}
		}
	}
}

// A skipped test reads as a passed one.
func TestNoTestIsSkipped(t *testing.T) {
	for _, file := range goFiles(t, true) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			f, ok := call.Fun.(*ast.SelectorExpr)
			if ok && (strings.HasPrefix(f.Sel.Name, "Skip") || f.Sel.Name == "Short") {
				t.Errorf("%s calls %s", file.name, f.Sel.Name)
			}
			return true
		})
	}
}

func TestPageHasEveryEndpoint(t *testing.T) {
	var patterns []string
	for _, rt := range routes(t) {
		patterns = append(patterns, rt.pattern)
	}
	wantSame(t, apiPage, "endpoint", pageTables(t, apiPage, "## Endpoints"), patterns)
}

func TestPageHasEveryErrorCode(t *testing.T) {
	seen := map[string]bool{}
	for _, file := range goFiles(t, false) {
		ast.Inspect(file.File, func(n ast.Node) bool {
			literal, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if name, ok := literal.Type.(*ast.Ident); !ok || name.Name != "problem" {
				return true
			}
			for _, element := range literal.Elts {
				field, ok := element.(*ast.KeyValueExpr)
				if !ok {
					t.Fatalf("%s has a problem without names of its fields", file.name)
				}
				name, value := field.Key.(*ast.Ident).Name, field.Value
				if text, ok := value.(*ast.BasicLit); ok && (name == "code" || name == "oauth") {
					seen[strings.Trim(text.Value, `"`)] = true
				}
			}
			return true
		})
	}
	if len(seen) < 20 {
		t.Fatalf("found only the codes %v in the source", seen)
	}
	wantSame(t, apiPage, "code", pageTables(t, apiPage, "## Errors"), slices.Sorted(maps.Keys(seen)))
}
