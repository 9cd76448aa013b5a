package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Inputs are named values of a JSON object or of a query string. Who takes one
// says how it must be. All that is wrong is reported at once.
type inputs struct {
	values map[string]any // text, or whatever JSON has; what was taken is gone
	known  []string       // names that were asked for
	faults map[string]any // what is wrong, by name
}

func newInputs() *inputs { return &inputs{values: map[string]any{}, faults: map[string]any{}} }

// take takes a value, which read reads, or says in its error how it must be.
// Nil is none.
func take[T any](in *inputs, name string, read func(any) (T, error)) *T {
	value, given := in.values[name]
	delete(in.values, name)
	in.known = append(in.known, name)
	if !given {
		return nil
	}
	v, err := read(value)
	if err != nil {
		fault := err.Error()
		if _, object := value.(map[string]any); !object && name != "publicKey" { // nor is a private key repeated
			got, _ := json.Marshal(value)
			fault += "; it was " + clip(string(got))
		}
		in.faults[name] = fault
		return nil
	}
	return &v
}

// problem says what is wrong, and what was not asked for, which is wrong too.
func (in *inputs) problem() error {
	for name := range in.values {
		if len(in.faults) == 100 { // enough to learn from, and the answer stays small
			break
		}
		in.faults[clip(name)] = "is not known here; there are " + strings.Join(in.known, ", ")
	}
	if len(in.faults) == 0 {
		return nil
	}
	return errValidation.with(in.faults)
}

// decode reads a body: one JSON object in UTF-8, spelled as read asks for it, and
// nothing after it. Go's decoder alone would let repeated and oddly cased names, null
// and invalid UTF-8 pass.
func decode[T any](r *request, read func(*inputs) T) (q T, err error) {
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/json" {
		return q, errMediaType.because("The Content-Type must be application/json; it was '" + clip(r.Header.Get("Content-Type")) + "'.")
	}
	in, d := newInputs(), json.NewDecoder(bytes.NewReader(r.body))
	value, wrong := readJSON(d)
	object, ok := value.(map[string]any)
	_, end := d.Token()
	switch {
	case len(r.body) == 0:
		wrong = "is empty"
	case !ok || !utf8.Valid(r.body):
		wrong = "doesn't begin with {, or isn't UTF-8"
	case wrong == "" && end != io.EOF:
		wrong = "doesn't end with its closing }"
	}
	if wrong != "" {
		return q, errValidation.because("The body must be one JSON object, and this one " + wrong + ".")
	}
	in.values = object
	q = read(in)
	return q, in.problem()
}

// readJSON reads a value, in whose objects each name is there once, or says what is wrong
// with it.
func readJSON(d *json.Decoder) (value any, wrong string) {
	value, err := d.Token()
	if err != nil {
		return nil, fmt.Sprintf("isn't JSON after byte %d", d.InputOffset())
	}
	begin, nested := value.(json.Delim)
	if !nested {
		return value, ""
	}
	object, list := map[string]any{}, []any{}
	for wrong == "" && d.More() {
		var item any
		if item, wrong = readJSON(d); begin == '[' || wrong != "" {
			list = append(list, item)
			continue
		}
		name, _ := item.(string)
		if _, again := object[name]; again {
			wrong = "has " + clip(name) + " twice"
		} else {
			object[name], wrong = readJSON(d)
		}
	}
	if _, err := d.Token(); wrong == "" && err != nil {
		wrong = "doesn't end with its closing " + map[json.Delim]string{'{': "}", '[': "]"}[begin]
	}
	if begin == '[' {
		return list, wrong
	}
	return object, wrong
}

// readQuery takes what the query string has, each name once.
func readQuery(r *request) *inputs {
	in := newInputs()
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		in.faults["query"] = "must be name=value pairs, with % only before two hex digits and no ;"
	}
	for name, list := range values {
		if in.values[name] = list[0]; len(list) > 1 {
			in.values[name] = list
		}
	}
	return in
}

func (in *inputs) span() span {
	part := span{1, 20}
	if page := take(in, "page", whole(1, countedTo)); page != nil {
		part.page = *page
	}
	if limit := take(in, "limit", whole(1, 100)); limit != nil {
		part.limit = *limit
	}
	if part.page*part.limit > countedTo {
		in.faults["page"] = "goes beyond the 10,000th row; read on by cursor where there is one, or ask for less"
	}
	return part
}

// parsed reads text that parse can read, or says must.
func parsed[T any](must string, parse func(string) (T, error)) func(any) (T, error) {
	return func(value any) (v T, err error) {
		text, ok := value.(string)
		if ok {
			v, err = parse(text)
		}
		if !ok || err != nil {
			err = errors.New(must)
		}
		return v, err
	}
}

func matching(must string, ok func(string) bool) func(any) (string, error) {
	return parsed(must, func(s string) (string, error) {
		if !ok(s) {
			return "", strconv.ErrSyntax
		}
		return s, nil
	})
}

func oneOf(allowed []string) func(any) (string, error) {
	return matching("must be one of "+strings.Join(allowed, ", "), func(s string) bool { return slices.Contains(allowed, s) })
}

func whole(least, most int) func(any) (int, error) {
	return parsed(fmt.Sprintf("must be a whole number from %d to %d", least, most), parseWhole(least, most))
}

func parseWhole(least, most int) func(string) (int, error) {
	return func(v string) (int, error) {
		n, err := strconv.Atoi(v)
		if n < least || n > most || strconv.Itoa(n) != v {
			err = strconv.ErrRange
		}
		return n, err
	}
}

// noText tells of what no issuer, subject or claim has: control characters, and what stands
// for broken ones, which are all the same then.
func noText(c rune) bool { return unicode.IsControl(c) || c == utf8.RuneError }
