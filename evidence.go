package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

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
	report, err := s.verifyChain(ctx, from, 1<<60, nil, func(e *event) error {
		line, err := encodeEvents(e, *e)
		if bytes.IndexByte(line, '\n') < len(line)-1 { // which could pass for several events
			err = fmt.Errorf("the metadata of seq %d has a line break, which this service doesn't write", e.Seq)
		}
		if err == nil {
			_, err = out.Write(line)
		}
		return err
	})
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
