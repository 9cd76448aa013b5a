// Openapi holds a document and recorded answers to each other:
//
//	go run . ../../openapi.yaml ../../answers.jsonl
//
// The document must be valid OpenAPI 3.1 and strict, with examples that fit
// their schemas. Each answer, with its headers, and each request that was
// accepted, must be as the document says. And whatever the document says, an
// operation, a status, an error code, a query parameter, must have been seen.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v4"
)

// rare are statuses that need not have been seen on each operation, and why.
var rare = map[string]string{
	"500": "takes a fault of the program itself; the suite makes one on one path",
	"503": "takes a store that is away, or a service that is stopping",
}

// anywhere are the responses to what is no operation.
var anywhere = map[string]string{
	"404": "NotFound", "405": "MethodNotAllowed", "404 oauth": "NotFoundOAuth", "405 oauth": "MethodNotAllowedOAuth",
}

var methods = []string{"get", "put", "post", "delete", "options", "head", "patch", "trace"}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: openapi DOCUMENT ANSWERS")
		os.Exit(64)
	}
	c := &checker{schemas: map[string]*jsonschema.Schema{}, seen: map[string]bool{}, faults: map[string]int{}}
	err := c.load(os.Args[1])
	if err == nil {
		c.checkDocument()
		err = c.checkAnswers(os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "openapi:", err)
		os.Exit(1)
	}
	for _, fault := range slices.Sorted(maps.Keys(c.faults)) {
		fmt.Printf("%s (%d times)\n", fault, c.faults[fault])
	}
	fmt.Printf("openapi: %d operations, %d examples, %d answers, %d requests\n%d passed, %d failed\n",
		len(c.operations), c.examples, c.answers, c.requests, c.passed, len(c.faults))
	if len(c.faults) > 0 {
		os.Exit(1)
	}
}

type object = map[string]any

type checker struct {
	text       []byte
	doc        object
	compiler   *jsonschema.Compiler
	schemas    map[string]*jsonschema.Schema // by pointer
	operations []operation
	seen       map[string]bool // "createAgent 201", "#/components/responses/X CODE", "listAgents ?page"
	faults     map[string]int

	examples, answers, requests, passed int
}

// An operation, by the pointer into the document.
type operation struct {
	id, method, path, pointer string
	node                      object
}

func (c *checker) fault(format string, args ...any) { c.faults[fmt.Sprintf(format, args...)]++ }

// check counts what holds, and tells what doesn't.
func (c *checker) check(ok bool, format string, args ...any) {
	if ok {
		c.passed++
	} else {
		c.fault(format, args...)
	}
}

func (c *checker) load(name string) (err error) {
	if c.text, err = os.ReadFile(name); err != nil {
		return err
	}
	var doc any
	if err := yaml.Unmarshal(c.text, &doc); err != nil {
		return err
	}
	asJSON, err := json.Marshal(doc) // fails where a name is no text
	if err != nil {
		return err
	}
	if doc, err = jsonschema.UnmarshalJSON(bytes.NewReader(asJSON)); err != nil {
		return err
	}
	c.doc, _ = doc.(object)
	c.compiler = jsonschema.NewCompiler()
	c.compiler.AssertFormat()
	if err := c.compiler.AddResource("urn:openapi", doc); err != nil {
		return err
	}
	paths, _ := c.doc["paths"].(object)
	for path, item := range paths {
		for _, method := range methods {
			if node, ok := item.(object)[method].(object); ok {
				id, _ := node["operationId"].(string)
				c.operations = append(c.operations, operation{id, strings.ToUpper(method), path, "#/paths/" + escape(path) + "/" + method, node})
			}
		}
	}
	if len(c.operations) == 0 {
		return fmt.Errorf("%s has no operations", name)
	}
	return nil
}

func escape(name string) string {
	return strings.ReplaceAll(strings.ReplaceAll(name, "~", "~0"), "/", "~1")
}

// at returns what a pointer points at, and where that is once all references
// are followed.
func (c *checker) at(pointer string) (any, string) {
	var node any = c.doc
	for _, piece := range strings.Split(strings.TrimPrefix(pointer, "#/"), "/") {
		name := strings.ReplaceAll(strings.ReplaceAll(piece, "~1", "/"), "~0", "~")
		switch in := node.(type) {
		case object:
			node = in[name]
		case []any:
			i, err := strconv.Atoi(name)
			if node = nil; err == nil && i < len(in) {
				node = in[i]
			}
		default:
			node = nil
		}
	}
	if o, ok := node.(object); ok && len(o) == 1 {
		if ref, ok := o["$ref"].(string); ok {
			return c.at(ref)
		}
	}
	return node, pointer
}

func (c *checker) object(pointer string) (object, string) {
	node, where := c.at(pointer)
	o, _ := node.(object)
	return o, where
}

// fits holds a value to the schema at a pointer.
func (c *checker) fits(value any, pointer string) error {
	schema := c.schemas[pointer]
	if schema == nil {
		var err error
		if schema, err = c.compiler.Compile("urn:openapi" + pointer); err != nil {
			return err
		}
		c.schemas[pointer] = schema
	}
	return schema.Validate(value)
}

// checkDocument holds the document to OpenAPI 3.1, and to what we want of it.
func (c *checker) checkDocument() {
	document, err := libopenapi.NewDocument(c.text)
	if err != nil {
		c.fault("the document: %v", err)
		return
	}
	version, _ := c.doc["openapi"].(string)
	c.check(strings.HasPrefix(version, "3.1."), "the document is of OpenAPI %q, want 3.1", version)
	v, errs := validator.NewValidator(document)
	for _, err := range errs {
		c.fault("the document: %v", err)
	}
	if len(errs) > 0 {
		return
	}
	_, invalid := v.ValidateDocument()
	for _, e := range invalid {
		c.fault("the document: %s: %s", e.Message, e.Reason)
		for _, s := range e.SchemaValidationErrors {
			c.fault("the document: %s: %s", s.FieldPath, s.Reason)
		}
	}
	used, ids := map[string]bool{}, map[string]bool{}
	for _, name := range anywhere {
		used["#/components/responses/"+name] = true
	}
	open := map[string]bool{} // what is the base of another may be open
	c.walk(c.doc, "#", func(node object, pointer string) {
		ref, _ := node["$ref"].(string)
		if ref != "" {
			target, _ := c.at(ref)
			c.check(target != nil, "%s refers to %s, which is not there", pointer, ref)
			used[ref] = true
			if strings.Contains(pointer, "/allOf/") {
				open[ref] = true
			}
		}
	})
	for kind, list := range c.doc["components"].(object) {
		for name := range list.(object) {
			pointer := "#/components/" + kind + "/" + escape(name)
			c.check(kind == "securitySchemes" || used[pointer], "%s is of no use", pointer)
			if kind == "schemas" {
				if err := c.fits(nil, pointer); err != nil {
					_, ofValue := err.(*jsonschema.ValidationError)
					c.check(ofValue, "%s is no schema: %v", pointer, err)
				}
			}
		}
	}
	for _, op := range c.operations {
		c.check(op.id != "" && !ids[op.id], "%s %s has the operationId %q, which is none or not the only one", op.method, op.path, op.id)
		ids[op.id] = true
	}
	c.walk(c.doc, "#", func(node object, pointer string) {
		if strings.Contains(pointer, "/example") {
			return
		}
		if node["type"] == "object" && !open[pointer] {
			_, additional := node["additionalProperties"]
			_, unevaluated := node["unevaluatedProperties"]
			c.check(additional || unevaluated, "%s doesn't say whether it may have more properties", pointer)
		}
		for i, example := range list(node["examples"]) {
			c.example(example, pointer, fmt.Sprintf("%s/examples/%d", pointer, i))
		}
		if node["schema"] == nil {
			return
		}
		if example, ok := node["example"]; ok {
			c.example(example, pointer+"/schema", pointer+"/example")
		}
		if named, ok := node["examples"].(object); ok {
			for name, example := range named {
				c.example(example.(object)["value"], pointer+"/schema", pointer+"/examples/"+name)
			}
		}
	})
}

func list(v any) []any {
	l, _ := v.([]any)
	return l
}

func (c *checker) example(value any, schema, where string) {
	c.examples++
	err := c.fits(value, schema)
	c.check(err == nil, "%s doesn't fit: %v", where, err)
}

// walk visits every object of the document.
func (c *checker) walk(node any, pointer string, visit func(object, string)) {
	switch in := node.(type) {
	case object:
		visit(in, pointer)
		for name, value := range in {
			c.walk(value, pointer+"/"+escape(name), visit)
		}
	case []any:
		for i, value := range in {
			c.walk(value, fmt.Sprintf("%s/%d", pointer, i), visit)
		}
	}
}

// An answer as the suite recorded it; request and query only where they were
// accepted.
type answer struct {
	Method, Path, Query, Request, RequestType string
	Status                                    int
	Type                                      string
	Header                                    map[string][]string
	Body                                      string
}

func (a answer) String() string {
	return fmt.Sprintf("%s %s: %d %s", a.Method, a.Path, a.Status, a.Body)
}

func (c *checker) checkAnswers(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var a answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		c.answers++
		c.checkAnswer(a)
	}
	if c.answers == 0 {
		c.fault("there are no answers")
	}
	c.checkCoverage()
	return lines.Err()
}

// operation finds that of an answer: a path without parameters goes first.
func (c *checker) operation(method, path string) *operation {
	var found *operation
	for i, op := range c.operations {
		if op.method != method {
			continue
		}
		if op.path == path {
			return &c.operations[i]
		}
		want, have := strings.Split(op.path, "/"), strings.Split(path, "/")
		if len(want) == len(have) && !slices.ContainsFunc(want, func(piece string) bool {
			mine := have[0]
			have = have[1:]
			return piece != mine && (piece == "" || piece[0] != '{' || mine == "")
		}) {
			found = &c.operations[i]
		}
	}
	return found
}

func (c *checker) checkAnswer(a answer) {
	status, method := strconv.Itoa(a.Status), a.Method
	if method == "HEAD" {
		method = "GET"
	}
	op := c.operation(method, a.Path)
	if op == nil {
		if method == "OPTIONS" && a.Status == 204 { // a browser's question
			c.check(a.Body == "", "%v has a body", a)
			return
		}
		if a.Path == "/api/v1/token" || strings.HasPrefix(a.Path, "/api/v1/token/") {
			status += " oauth"
		}
		if anywhere[status] == "" {
			c.fault("%v is of no operation", a)
			return
		}
		c.seen["#/components/responses/"+anywhere[status]] = true
		c.checkResponse(a, "#/components/responses/"+anywhere[status])
		return
	}
	pointer := op.pointer + "/responses/" + status
	if node, _ := c.at(pointer); node == nil {
		c.fault("%s doesn't answer %s, but %v", op.id, status, a)
		return
	}
	c.seen[op.id+" "+status] = true
	c.checkResponse(a, pointer)
	if a.Status < 300 {
		c.checkRequest(a, op)
	}
}

func (c *checker) checkResponse(a answer, pointer string) {
	response, where := c.object(pointer)
	c.checkHeaders(a, where)
	content, _ := response["content"].(object)
	if content == nil {
		c.check(a.Body == "" && a.Type == "", "%v as %q, want no body", a, a.Type)
		return
	}
	if content[a.Type] == nil {
		c.fault("%v is %q, want %v", a, a.Type, slices.Collect(maps.Keys(content)))
		return
	}
	if a.Method == "HEAD" {
		c.check(a.Body == "", "%v has a body", a)
		return
	}
	var value any = a.Body
	if a.Type == "application/json" {
		var err error
		if value, err = jsonschema.UnmarshalJSON(strings.NewReader(a.Body)); err != nil {
			c.fault("%v is no JSON: %v", a, err)
			return
		}
	}
	err := c.fits(value, where+"/content/"+escape(a.Type)+"/schema")
	c.check(err == nil, "%v\n  %v", a, err)
	if body, ok := value.(object); ok {
		for _, name := range []string{"code", "error"} {
			if code, ok := body[name].(string); ok {
				c.seen[where+" "+code] = true
			}
		}
	}
}

func (c *checker) checkHeaders(a answer, response string) {
	headers, _ := c.object(response + "/headers")
	known := map[string]bool{}
	for name := range headers {
		header, where := c.object(response + "/headers/" + escape(name))
		values := []string{}
		for have, list := range a.Header {
			if strings.EqualFold(have, name) {
				values, known[have] = list, true
			}
		}
		if len(values) == 0 {
			c.check(header["required"] != true, "%v lacks the header %s", a, name)
			continue
		}
		for _, text := range values {
			schema, schemaAt := c.object(where + "/schema")
			err := c.fits(typed(text, schema), schemaAt)
			c.check(err == nil && len(values) == 1, "%v has the headers %s %q: %v", a, name, values, err)
		}
	}
	for name := range a.Header {
		c.check(known[name], "%v has the header %s, of which the document doesn't know", a, name)
	}
}

// typed reads text as the number that a schema wants.
func typed(text string, schema object) any {
	if _, err := strconv.ParseInt(text, 10, 64); err == nil && schema["type"] == "integer" {
		return json.Number(text)
	}
	return text
}

// checkRequest holds what was accepted to what is documented.
func (c *checker) checkRequest(a answer, op *operation) {
	c.requests++
	query, err := url.ParseQuery(a.Query)
	if err != nil {
		query = nil // accepted where nobody reads it
	}
	known := 0
	for i := range list(op.node["parameters"]) {
		parameter, where := c.object(fmt.Sprintf("%s/parameters/%d", op.pointer, i))
		name, _ := parameter["name"].(string)
		if parameter["in"] != "query" {
			continue
		}
		known++
		for _, text := range query[name] {
			schema, schemaAt := c.object(where + "/schema")
			err := c.fits(typed(text, schema), schemaAt)
			c.check(err == nil, "%s accepts %s=%q: %v", op.id, name, text, err)
			c.seen[op.id+" ?"+name] = true
		}
		delete(query, name)
	}
	c.check(len(query) == 0 || known == 0, "%s accepts %v, of which the document doesn't know", op.id, query)

	body, where := c.object(op.pointer + "/requestBody")
	if body == nil {
		return
	}
	content, _ := body["content"].(object)
	for kind := range content {
		schemaAt := where + "/content/" + escape(kind) + "/schema"
		var value any
		if kind == "application/json" {
			value, err = jsonschema.UnmarshalJSON(strings.NewReader(a.Request))
		} else {
			value, err = c.form(a.Request, schemaAt)
		}
		if err == nil {
			err = c.fits(value, schemaAt)
		}
		c.check(err == nil, "%s accepts %q: %v", op.id, a.Request, err)
	}
}

// form reads a form, in which an empty parameter is none.
func (c *checker) form(text, schemaAt string) (any, error) {
	_, schemaAt = c.object(schemaAt)
	values, err := url.ParseQuery(text)
	o := object{}
	for name, list := range values {
		all := []any{}
		for _, value := range list {
			if value != "" {
				all = append(all, value)
			}
		}
		property, _ := c.object(schemaAt + "/properties/" + escape(name))
		if len(all) == 0 {
			continue
		} else if o[name] = all; property["type"] != "array" {
			o[name] = all[0]
		}
	}
	return o, err
}

// checkCoverage wants all that is documented to have been seen.
func (c *checker) checkCoverage() {
	for _, op := range c.operations {
		responses, _ := op.node["responses"].(object)
		for status := range responses {
			c.check(c.seen[op.id+" "+status] || rare[status] != "", "%s answers %s: the suite has never seen that", op.id, status)
			_, where := c.at(op.pointer + "/responses/" + status)
			for _, code := range c.codes(where + "/content/application~1json/schema") {
				c.check(c.seen[where+" "+code] || rare[status] != "", "%s %s: the suite has never seen %s", op.id, status, code)
			}
		}
		for i := range list(op.node["parameters"]) {
			parameter, _ := c.object(fmt.Sprintf("%s/parameters/%d", op.pointer, i))
			if parameter["in"] != "query" { // what was sent in headers is not recorded
				continue
			}
			c.check(c.seen[fmt.Sprintf("%s ?%s", op.id, parameter["name"])], "%s takes %s: the suite has never seen that", op.id, parameter["name"])
		}
	}
	for _, name := range anywhere {
		c.check(c.seen["#/components/responses/"+name], "the suite has never seen the response %s", name)
	}
}

// codes are those that an error's schema allows.
func (c *checker) codes(schemaAt string) (codes []string) {
	schema, where := c.object(schemaAt)
	for i := range list(schema["oneOf"]) {
		codes = append(codes, c.codes(fmt.Sprintf("%s/oneOf/%d", where, i))...)
	}
	for _, name := range []string{"code", "error"} {
		property, _ := c.object(where + "/properties/" + name)
		if only, ok := property["const"].(string); ok {
			codes = append(codes, only)
		}
		for _, one := range list(property["enum"]) {
			codes = append(codes, fmt.Sprint(one))
		}
	}
	return codes
}
