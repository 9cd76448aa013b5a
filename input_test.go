package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// FuzzDecode: what is let through is one JSON object in UTF-8 with known
// names, each once and none null, and it is taken as it is.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"owner":"team"}`, `{"owner":"team","status":"active","capabilities":["a:b"]} `, `{"owner":"a","owner":"b"}`,
		`{"Owner":"a"}`, `{"owner":null}`, `{"\u006fwner":"é"}`, `{"owner":"a"}{}`, `null`, `[]`, `{`, `{"owner":"\u0000"}`,
		`{"owner":"a","owner\":\"x\",\"status":"active"}`,
		"{\"owner\":\"\xff\"}", `{"owner":"\ud800"}`, `{"version":"1.0.0-a+b","agentType":"router","deploymentEnv":"staging"}`,
	} {
		f.Add([]byte(seed))
	}
	names := []string{"agentType", "version", "capabilities", "owner", "deploymentEnv", "status"}
	f.Fuzz(func(t *testing.T, body []byte) {
		in := httptest.NewRequest("PATCH", "/", bytes.NewReader(body))
		in.Header.Set("Content-Type", "application/json")
		q, err := decode(&request{Request: in}, func(in *inputs) agentChange {
			q := readAgentChange(in)
			q.Status = take(in, "status", oneOf(statuses))
			return q
		})
		if err != nil {
			if p, ok := errors.AsType[*problem](err); !ok || p.status != 400 {
				t.Errorf("decode(%q) = %v, want a 400", body, err)
			}
			return
		}
		var asMap map[string]any
		if err := json.Unmarshal(body, &asMap); err != nil || !utf8.Valid(body) || asMap == nil {
			t.Fatalf("decode(%q) succeeded, want an error: %v", body, err)
		}
		top := 0 // names at the top of the object, whose values are text or lists of text
		d, depth, isName := json.NewDecoder(bytes.NewReader(body)), 0, true
		for token, err := d.Token(); err == nil; token, err = d.Token() {
			switch delim, _ := token.(json.Delim); delim {
			case '{', '[':
				depth++
				continue
			case ']':
				depth--
			}
			if depth == 1 {
				if isName && token != json.Delim('}') {
					top++
				}
				isName = !isName
			}
		}
		if top != len(asMap) {
			t.Errorf("decode(%q) succeeded with %d names, of which %d differ", body, top, len(asMap))
		}
		for name, value := range asMap {
			if !slices.Contains(names, name) || value == nil {
				t.Errorf("decode(%q) succeeded with %q: %v", body, name, value)
			}
		}
		taken, _ := json.Marshal(q)
		var got map[string]any
		if err := json.Unmarshal(taken, &got); err != nil {
			t.Fatal(err)
		}
		maps.DeleteFunc(got, func(_ string, value any) bool { return value == nil })
		was, _ := json.Marshal(asMap)
		if is, _ := json.Marshal(got); !bytes.Equal(is, was) {
			t.Errorf("decode(%q) = %s, want %s", body, is, was)
		}
	})
}

// A query of a list is refused, or means one thing that PostgreSQL can take.
func FuzzQuery(f *testing.F) {
	for _, seed := range []string{
		"", "page=1&limit=20", "page=101&limit=100", "page=01", "page=+1", "page=1&page=1", "owner=%00", "owner=%ff", "owner=%zz", "owner=a;b",
		"Owner=a", "=", "&&", "owner", "owner=é&%6fwner=b", "limit=9223372036854775808", "\x00=\xff", "page=%31",
		"fromDate=2026-03-28&toDate=9999-12-31T23:59:59-23:59", "fromDate=0000-01-01T00:00:00Z",
	} {
		f.Add(seed)
	}
	names := []string{"page", "limit", "owner", "fromDate", "toDate"}
	f.Fuzz(func(t *testing.T, raw string) {
		in := readQuery(&request{Request: &http.Request{URL: &url.URL{RawQuery: raw}}})
		part, owner := in.span(), take(in, "owner", owner)
		from, to := take(in, "fromDate", date(0)), take(in, "toDate", date(24*time.Hour))
		err := in.problem()
		for name := range in.faults {
			if clip(name) != name {
				t.Errorf("%q is refused with the detail %q, want printable ASCII", raw, name)
			}
		}
		if part.page < 1 || part.limit < 1 || part.limit > 100 || part.page*part.limit > countedTo && in.faults["page"] == nil {
			t.Errorf("%q asks for page %d of %d", raw, part.page, part.limit)
		}
		for _, date := range []*time.Time{from, to} {
			if date != nil && (date.UTC().Year() < 1969 || date.UTC().Year() > 10000) {
				t.Errorf("%q asks for %s", raw, date)
			}
		}
		if err != nil {
			return
		}
		values, err := url.ParseQuery(raw)
		if err != nil {
			t.Errorf("%q was read, and means nothing: %v", raw, err)
		}
		for name, list := range values {
			if len(list) != 1 || !slices.Contains(names, name) {
				t.Errorf("%q has %q=%q in it", raw, name, list)
			}
		}
		if (owner != nil) != values.Has("owner") || owner != nil && (*owner != values.Get("owner") || !utf8.ValidString(*owner) || strings.Contains(*owner, "\x00")) {
			t.Errorf("%q was read as the owner %v", raw, owner)
		}
	})
}
