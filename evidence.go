package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"time"
)

// An inquiry is what the command verify-audit or audit-export is asked for.
type inquiry struct {
	export, follow bool
	file, jwks     string // what was exported, and the keys; "" is by the database
	checkpoint     string // to be extended; "" is none
	from           int64  // a seq; 0 is where the log begins
	part           *part  // nil is all
}

// readInquiry reads the arguments of a command: flags, and one operand.
func readInquiry(args []string) (q inquiry, err error) {
	flags, of := flag.NewFlagSet("", flag.ContinueOnError), part{}
	flags.SetOutput(io.Discard)
	day := func(to **moment, rest time.Duration) func(string) error {
		return func(text string) error {
			t, err := date(rest)(text)
			*to, q.part = &moment{t.Truncate(time.Millisecond)}, &of
			return err
		}
	}
	if q.export = args[0] == "audit-export"; q.export {
		flags.BoolVar(&q.follow, "follow", false, "")
		flags.Func("from", "", day(&of.FromDate, 0))
		flags.Func("to", "", day(&of.ToDate, 24*time.Hour-time.Millisecond))
		flags.Func("agent", "", func(id string) (err error) {
			if of.AgentID, q.part = &id, &of; !isID(id) {
				err = errors.New("must be a UUID in lower case")
			}
			return err
		})
	} else {
		flags.StringVar(&q.file, "file", "", "")
		flags.StringVar(&q.jwks, "jwks", "", "")
	}
	err = flags.Parse(args[1:])
	from, noSeq := parseWhole(1, 1<<53)(flags.Arg(0))
	q.checkpoint, q.from = flags.Arg(0), int64(from)
	switch {
	case err != nil:
	case flags.NArg() > 1:
		err = fmt.Errorf("%q are too many operands; flags stand before one", flags.Args())
	case q.export && flags.NArg() == 1 && noSeq != nil:
		err = errors.New("FROM_SEQ must be a whole number, from 1")
	case !q.export && flags.NArg() == 1 && q.checkpoint == "":
		err = errors.New("CHECKPOINT is empty")
	case !q.export && flags.NFlag() > 0 && (q.file == "" || q.jwks == ""):
		err = errors.New("-file and -jwks must both name a file")
	case q.part != nil && (q.follow || flags.NArg() > 0):
		err = errors.New("-agent, -from and -to are without -follow and FROM_SEQ")
	case of.FromDate != nil && of.ToDate != nil && of.ToDate.Before(of.FromDate.Time):
		err = errors.New("-to must not be before -from")
	}
	return q, err
}

func (s *server) inquire(ctx context.Context, q inquiry, stdout io.Writer, progress func(*event) error) error {
	switch {
	case q.follow:
		return s.followAudit(ctx, q.from, stdout)
	case q.export:
		return s.exportAudit(ctx, q.from, q.part, stdout)
	}
	return q.verifyAudit(s.keys.Load(), stdout, func(cp *checkpoint) (chainReport, string, error) {
		report, err := s.verifyChain(ctx, 1, 1<<60, cp, progress)
		if err == nil {
			err = s.signCheckpoint(&report, nil)
		}
		return report, s.cfg.issuer, err
	})
}

const (
	altered    = "the audit log was altered: the first bad seq is %d"
	beyondEnd  = "seq %d is beyond the end of the log"
	beginsAt   = "the log begins at seq %d: what was before is dropped"
	unreadable = "reading the export: %w"
)

// verifyAudit has a chain read whole, and says whether it is as it was written, of which
// issuer, and whether it extends a checkpoint kept elsewhere.
func (q inquiry) verifyAudit(keys *keyset, stdout io.Writer, read func(*checkpoint) (chainReport, string, error)) error {
	var cp *checkpoint
	if q.checkpoint != "" {
		cp = &checkpoint{}
		if keys.open(auditCheckpoint, q.checkpoint, cp) != nil {
			return errors.New("this is no checkpoint that a key here signed: is it whole, is the key of its time in JWT_PUBLIC_KEY, or in the file of -jwks?")
		}
	}
	report, issuer, err := read(cp)
	switch {
	case err != nil:
		return err
	case cp != nil && cp.Issuer != issuer:
		return fmt.Errorf("this is no checkpoint of this issuer: it is of %q, and the log of %q", cp.Issuer, issuer)
	case cp != nil && cp.Seq < report.FromSeq && !report.linked:
		return fmt.Errorf("the log begins at seq %d, after the checkpoint at %d: use a later one if what was before is dropped for its age; else the log was altered", report.FromSeq, cp.Seq)
	case cp != nil && report.part != nil && cp.Seq != report.HeadSeq:
		return fmt.Errorf("a part of the log can't be held to the checkpoint at seq %d, only to one of its end, seq %d", cp.Seq, report.HeadSeq)
	case !report.Verified:
		return fmt.Errorf(altered, report.FirstBadSeq)
	case cp != nil && cp.Seq > report.HeadSeq:
		return fmt.Errorf("the export ends at seq %d, before the checkpoint at %d: use an earlier one, or a later export", report.HeadSeq, cp.Seq)
	}
	if report.part != nil {
		asked, _ := json.Marshal(report.part)
		fmt.Fprintf(stdout, "verified: %d events, only a part of the log up to seq %d: %s\n", report.Events, report.HeadSeq, asked)
		fmt.Fprintf(stdout, "that none of the part is missing is the word of whoever holds the key\nissuer: %s\n", issuer)
	} else {
		fmt.Fprintf(stdout, "verified: %d events, from seq %d to %d\nissuer: %s\n", report.Events, report.FromSeq, report.HeadSeq, issuer)
	}
	if report.FromSeq > 1 {
		fmt.Fprintf(stdout, "nothing is said of what was before seq %d\n", report.FromSeq)
	}
	if cp != nil {
		fmt.Fprintf(stdout, "extends the checkpoint at seq %d\n", cp.Seq)
	}
	if report.Checkpoint != nil {
		fmt.Fprintf(stdout, "checkpoint: %s\n", *report.Checkpoint)
	}
	return nil
}

// verifyFile does so with what audit-export has printed, by the keys as they are published.
func (q inquiry) verifyFile(stdout io.Writer) error {
	var set map[string]any
	text, err := os.ReadFile(q.jwks)
	if err == nil {
		err = json.Unmarshal(text, &set)
	}
	keys := &keyset{}
	for _, k := range usable(set) {
		if public, err := k.public(); err == nil {
			_ = keys.add(public) // one that can't be ours has signed nothing here
		}
	}
	if err != nil || keys.public == nil {
		return fmt.Errorf("reading the keys of -jwks: %w", cmp.Or(err, errors.New("there is none; GET /.well-known/jwks.json answers them")))
	}
	in := os.Stdin
	if q.file != "-" {
		if in, err = os.Open(q.file); err != nil {
			return err
		}
		defer in.Close()
	}
	return q.verifyAudit(keys, stdout, func(cp *checkpoint) (chainReport, string, error) { return readExport(in, keys, cp) })
}

// readExport checks what was exported, a line at a time, and returns its issuer too. A line has to be
// what is printed of its event, byte for byte, and the last one the checkpoint of the last event.
func readExport(in io.Reader, keys *keyset, cp *checkpoint) (report chainReport, issuer string, err error) {
	var end struct{ Checkpoint string }
	var last checkpoint
	lines, x := bufio.NewReaderSize(in, 1<<20), selection{sum: sha256.New()}
	for n := 1; ; n++ {
		line, err := lines.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return report, "", fmt.Errorf("line %d is missing or cut off: an export ends with a checkpoint", n)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) { // no event has so long a line
			return report, "", fmt.Errorf(unreadable, err)
		}
		var e event
		_ = json.Unmarshal(line, &e) // what can't be read is not what is printed, either
		if printed, _ := encodeEvents(e, e); e.Seq < 1 || !bytes.Equal(line, printed) {
			_ = json.Unmarshal(line, &end)
			if string(line) != `{"checkpoint":"`+end.Checkpoint+"\"}\n" || keys.open(auditCheckpoint, end.Checkpoint, &last) != nil {
				return report, "", fmt.Errorf("line %d is neither an event as it is printed, nor a checkpoint that a key of -jwks signed", n)
			}
			if _, err := lines.ReadByte(); err == nil {
				return report, "", fmt.Errorf("line %d is behind the checkpoint, with which an export ends", n+1)
			} else if !errors.Is(err, io.EOF) {
				return report, "", fmt.Errorf(unreadable, err)
			}
			break
		}
		if n == 1 {
			report = chainReport{FromSeq: e.Seq, HeadSeq: e.Seq - 1, HeadHash: e.PrevHash}
			if e.Seq == 1 {
				report.HeadHash = make(digest, sha256.Size)
			} else if report.linked = cp != nil && cp.Seq == e.Seq-1; report.linked {
				report.HeadHash, _ = hex.DecodeString(cp.Hash)
			}
		}
		if report.FirstBadSeq == 0 {
			report.extend(&e, 0, time.Time{}, cp)
		}
		if x.bad == 0 && (e.Seq <= x.seq || !bytes.Equal(e.Hash, e.sum())) {
			x.bad = e.Seq
		}
		x.add(&e) // whether it is all or a part, the last line says
	}
	if report.part = last.Part; report.part != nil {
		report.FromSeq, report.HeadSeq, report.Events, report.FirstBadSeq = 0, last.Seq, x.events, x.bad
	}
	switch p := last.Part; {
	case report.FirstBadSeq != 0:
	case p != nil && (p.Events != x.events || !bytes.Equal(p.Digest, x.sum.Sum(nil)) || x.seq > last.Seq):
		return report, "", fmt.Errorf("these are not the %d events that were signed as this part of the log", p.Events)
	case p != nil && cp != nil && cp.Hash != last.Hash:
		report.FirstBadSeq = last.Seq
	case p != nil:
	case last.Seq != report.HeadSeq:
		report.FirstBadSeq = min(last.Seq, report.HeadSeq) + 1
	case last.Hash != hex.EncodeToString(report.HeadHash):
		report.FirstBadSeq = last.Seq
	}
	report.Verified, report.Checkpoint = report.FirstBadSeq == 0, &end.Checkpoint
	return report, last.Issuer, nil
}

// exportAudit prints the events from a seq on (0: from the first), or a part of them (nil: all),
// one a line as they are served, and a checkpoint of the last of all behind them. All are checked;
// what is bad, and what follows it, is not printed.
func (s *server) exportAudit(ctx context.Context, from int64, of *part, stdout io.Writer) error {
	out, x := bufio.NewWriter(stdout), selection{sum: sha256.New()}
	report, err := s.verifyChain(ctx, from, 1<<60, nil, func(e *event) error {
		if from > 0 && x.events == 0 && e.Seq > from {
			return fmt.Errorf(beginsAt, e.Seq)
		}
		if of == nil || of.has(e) {
			x.add(e)
			return printEvent(out, e)
		}
		return nil
	})
	if of != nil {
		of.Events, of.Digest = x.events, x.sum.Sum(nil)
	}
	if err == nil && !report.Verified {
		err = fmt.Errorf(altered, report.FirstBadSeq)
	} else if err == nil && report.Events == 0 && from > 1 {
		err = fmt.Errorf(beyondEnd, from)
	} else if err == nil {
		err = s.signCheckpoint(&report, of)
	}
	if err == nil {
		err = json.NewEncoder(out).Encode(map[string]*string{"checkpoint": report.Checkpoint})
	}
	return errors.Join(err, out.Flush())
}

// A selection is what is printed as a part.
type selection struct {
	bad, seq, events int64 // the first seq that is bad (0: none), the last, and how many
	sum              hash.Hash
}

func (x *selection) add(e *event) {
	x.seq, x.events = e.Seq, x.events+1
	fmt.Fprintf(x.sum, "%x\n", e.Hash)
}

func printEvent(out io.Writer, e *event) error {
	line, err := encodeEvents(e, *e)
	if bytes.IndexByte(line, '\n') < len(line)-1 { // which could pass for several events
		err = fmt.Errorf("the metadata of seq %d has a line break, which this service doesn't write", e.Seq)
	}
	if err == nil {
		_, err = out.Write(line)
	}
	return err
}

// followAudit prints the events from a seq on (0: from the first), and what comes behind
// them, until ctx ends. It reads on from the last event that it has, to which the log is
// held, so that one which was rewritten or restored meanwhile is an error. PostgreSQL
// doesn't wait for who reads what is printed.
func (s *server) followAudit(ctx context.Context, from int64, stdout io.Writer) error {
	last, down := checkpoint{}, false // of seq 0 at first, which demands nothing
	for {
		var out bytes.Buffer
		var failed error // what else fails is PostgreSQL's
		held := last
		reading, cancel := context.WithTimeout(ctx, requestTimeout)
		report, err := s.verifyChain(reading, max(from, 1), feedPage, &held, func(e *event) error {
			if from > 0 && e.Seq > max(from, last.Seq+1) {
				failed = fmt.Errorf(beginsAt, e.Seq)
			} else if e.Seq > held.Seq {
				failed = printEvent(&out, e)
			}
			last = checkpoint{Seq: e.Seq, Hash: hex.EncodeToString(e.Hash)}
			return failed
		})
		cancel()
		_, gone := out.WriteTo(stdout)
		switch failed = cmp.Or(failed, gone); {
		case failed != nil:
			return failed
		case err != nil && !down && ctx.Err() == nil:
			slog.Warn("waiting for PostgreSQL", "error", err)
		case err == nil && !report.Verified:
			return fmt.Errorf(altered, report.FirstBadSeq)
		case err == nil && report.Events == 0 && report.linked: // from is what comes next
			last = checkpoint{Seq: report.HeadSeq, Hash: hex.EncodeToString(report.HeadHash)}
		case err == nil && report.Events == 0 && from > 1:
			return fmt.Errorf(beyondEnd, from)
		}
		if down = err != nil; last.Seq > 0 {
			from = last.Seq
		}
		if err == nil && report.Events == feedPage {
			continue
		}
		select {
		case <-time.After(feedEvery):
		case <-ctx.Done():
			return nil
		}
	}
}

// progress shows on a terminal, in one line, how much of the log is read.
func progress(stderr io.Writer) func(*event) error {
	file, _ := stderr.(*os.File)
	if info, err := file.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	return func(e *event) error {
		if e.Seq%10_000 == 0 {
			fmt.Fprintf(file, "read up to seq %d\r", e.Seq) // what is printed next takes its place
		}
		return nil
	}
}
