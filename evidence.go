package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"
)

// An inquiry is what the command verify-audit or audit-export is asked for.
type inquiry struct {
	export     bool
	checkpoint string // to be extended; "" is none
	from       int64
	follow     bool
}

// readInquiry reads the arguments of a command: flags, and one operand.
func readInquiry(args []string) (q inquiry, err error) {
	q.export, q.from = args[0] == "audit-export", 1
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	if q.export {
		flags.BoolVar(&q.follow, "follow", false, "")
	}
	err = flags.Parse(args[1:])
	operand := flags.Arg(0)
	switch {
	case err != nil:
	case flags.NArg() > 1:
		err = fmt.Errorf("%q are too many operands; flags stand before one", flags.Args())
	case flags.NArg() == 0:
	case operand == "" && !q.export:
		err = errors.New("CHECKPOINT is empty")
	case q.export:
		from, wrong := parseWhole(1, 1<<53)(operand)
		if q.from = int64(from); wrong != nil {
			err = errors.New("FROM_SEQ must be a whole number, from 1")
		}
	default:
		q.checkpoint = operand
	}
	return q, err
}

func (s *server) inquire(ctx context.Context, q inquiry, stdout io.Writer, progress func(*event) error) error {
	switch {
	case q.follow:
		return s.followAudit(ctx, q.from, stdout)
	case q.export:
		return s.exportAudit(ctx, q.from, stdout)
	}
	return s.verifyAudit(ctx, q.checkpoint, stdout, progress)
}

const altered = "the audit log was altered: the first bad seq is %d"

// verifyAudit reads the whole chain and says whether it is as it was written,
// and whether it extends a checkpoint kept elsewhere.
func (s *server) verifyAudit(ctx context.Context, signed string, stdout io.Writer, progress func(*event) error) error {
	var cp *checkpoint
	if signed != "" {
		cp = &checkpoint{}
		if s.keys.Load().open(auditCheckpoint, signed, cp) != nil {
			return errors.New("this is no checkpoint that a key here signed: is it whole, is the key of its time in JWT_PUBLIC_KEY?")
		}
		if cp.Issuer != s.cfg.issuer {
			return fmt.Errorf("this is no checkpoint of this issuer: it is of %q, and ISSUER is %q", cp.Issuer, s.cfg.issuer)
		}
	}
	report, err := s.verifyChain(ctx, 1, 1<<60, cp, progress)
	if err != nil {
		return err
	}
	if cp != nil && cp.Seq < report.FromSeq {
		return fmt.Errorf("the log begins at seq %d, after the checkpoint at %d: use a later one if what was before is dropped for its age; else the log was altered", report.FromSeq, cp.Seq)
	}
	if !report.Verified {
		return fmt.Errorf(altered, report.FirstBadSeq)
	}
	fmt.Fprintf(stdout, "verified: %d events, from seq %d to %d\n", report.Events, report.FromSeq, report.HeadSeq)
	if cp != nil {
		fmt.Fprintf(stdout, "extends the checkpoint at seq %d\n", cp.Seq)
	}
	if report.Checkpoint != nil {
		fmt.Fprintf(stdout, "checkpoint: %s\n", *report.Checkpoint)
	}
	return nil
}

// exportAudit prints the events from a seq on, one a line as they are served,
// and a checkpoint of the last behind them. What is printed is checked; what is
// bad, and what follows it, is not printed.
func (s *server) exportAudit(ctx context.Context, from int64, stdout io.Writer) error {
	out := bufio.NewWriter(stdout)
	report, err := s.verifyChain(ctx, from, 1<<60, nil, func(e *event) error { return printEvent(out, e) })
	if err == nil && !report.Verified {
		err = fmt.Errorf(altered, report.FirstBadSeq)
	} else if err == nil && report.Events == 0 && from > 1 {
		err = fmt.Errorf("seq %d is beyond the end of the log", from)
	}
	if err == nil {
		err = json.NewEncoder(out).Encode(map[string]*string{"checkpoint": report.Checkpoint})
	}
	return errors.Join(err, out.Flush())
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

// followAudit prints the events from a seq on, and what comes behind them, until
// ctx ends. It reads on from the last event that it has, to which the log is held,
// so that one which was rewritten or restored meanwhile is an error.
func (s *server) followAudit(ctx context.Context, from int64, stdout io.Writer) error {
	out, last, down := bufio.NewWriter(stdout), checkpoint{}, false
	for {
		var held *checkpoint
		if last.Seq > 0 {
			held, from = &checkpoint{Seq: last.Seq, Hash: last.Hash}, last.Seq
		}
		var failed error // in printing; what else fails is PostgreSQL's
		reading, cancel := context.WithCancel(ctx)
		hangs := time.AfterFunc(requestTimeout, cancel)
		report, err := s.verifyChain(reading, from, 1<<60, held, func(e *event) error {
			hangs.Stop() // who reads what is printed may take its time
			defer hangs.Reset(requestTimeout)
			if e.Seq > last.Seq {
				failed, last = printEvent(out, e), checkpoint{Seq: e.Seq, Hash: hex.EncodeToString(e.Hash)}
			}
			return failed
		})
		cancel()
		if failed = errors.Join(failed, out.Flush()); failed != nil {
			return failed
		}
		switch {
		case err != nil && !down && ctx.Err() == nil:
			slog.Warn("waiting for PostgreSQL", "error", err)
		case err == nil && !report.Verified:
			return fmt.Errorf(altered, report.FirstBadSeq)
		case err == nil && report.Events == 0 && report.linked: // from is what comes next
			last = checkpoint{Seq: report.HeadSeq, Hash: hex.EncodeToString(report.HeadHash)}
		case err == nil && report.Events == 0 && from > 1:
			return fmt.Errorf("seq %d is beyond the end of the log", from)
		}
		down = err != nil
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
