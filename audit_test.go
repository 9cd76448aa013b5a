package main

import (
	"testing"
)

// A cursor is one that we have sent, byte for byte, or none.
func FuzzCursor(f *testing.F) {
	s := &server{}
	s.keys.Store(mustReadKeys(f, testKey(), ""))
	good, err := s.keys.Load().sign(auditCursor, cursor{7, 8})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint8(0), uint8(0), "")
	f.Add(uint8(10), uint8(1), "A")
	f.Add(uint8(0), uint8(255), good+"\n")
	f.Add(uint8(0), uint8(255), "AAAAAAAAAAE")
	f.Add(uint8(0), uint8(11), "__________8")
	f.Fuzz(func(t *testing.T, from, length uint8, text string) {
		start := int(from) % (len(good) + 1)
		signed := good[:start] + text + good[min(start+int(length), len(good)):]
		want := cursor{}
		if signed == good {
			want = cursor{7, 8}
		}
		if got, err := s.openCursor(signed); got != want || (err == nil) != (signed == good) {
			t.Errorf("openCursor(%q) = %v, %v, want %v", signed, got, err, want)
		}
	})
}
