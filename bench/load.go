package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"time"
)

// The load is a process of its own, so that its CPU time can be told from the
// server's. It speaks HTTP/1.1 with as little work as it can: each connection
// sends a request whose bytes are given, reads the answer, and sends the next.

// A job is what a load process is to do.
type job struct {
	Network, Address string
	Connections      int
	Seconds          float64
	Requests         [][]byte // taken in turn by all connections
	Once             bool     // each of them; stop when there are no more
	Count            int      // stop after so many; 0: after Seconds
}

// A result is what came of it.
type result struct {
	Answers  int           // with a status below 300
	Failures int           // others
	Failure  string        // the first of them
	Elapsed  time.Duration // from the first request to the last answer
	P50, P99 time.Duration
	CPU      time.Duration // of the load process
	Server   time.Duration // CPU of the servers, where under has measured it
}

func (r result) rate() float64 { return float64(r.Answers) / r.Elapsed.Seconds() }

// load runs a job in another process.
func load(j job) (r result, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	input, err := json.Marshal(j)
	if err != nil {
		return r, err
	}
	cmd := exec.Command(self, "load")
	cmd.Stdin, cmd.Stderr = bytes.NewReader(input), os.Stderr
	output, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("the load: %w", err)
	}
	if err := json.Unmarshal(output, &r); err != nil {
		return r, err
	}
	r.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	if r.Failures > 0 || r.Answers == 0 {
		return r, fmt.Errorf("%d of %d requests failed, the first with: %s", r.Failures, r.Failures+r.Answers, r.Failure)
	}
	return r, nil
}

// runLoad is the load process.
func runLoad(in io.Reader, out io.Writer) error {
	var j job
	if err := json.NewDecoder(in).Decode(&j); err != nil {
		return err
	}
	var mu sync.Mutex
	var r result
	var times []time.Duration
	next := 0
	take := func() (request []byte, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if j.Count > 0 && next == j.Count || j.Once && next == len(j.Requests) {
			return nil, false
		}
		request = j.Requests[next%len(j.Requests)]
		next++
		return request, true
	}
	conns := make([]net.Conn, j.Connections)
	for i := range conns {
		conn, err := net.Dial(j.Network, j.Address)
		if err != nil {
			return err
		}
		defer conn.Close()
		conns[i] = conn
	}
	begun := time.Now()
	end := begun.Add(time.Duration(j.Seconds * float64(time.Second)))
	var group sync.WaitGroup
	for _, conn := range conns {
		group.Go(func() {
			reader := bufio.NewReaderSize(conn, 16<<10)
			var own []time.Duration
			var failures int
			var failure string
			for j.Count > 0 || time.Now().Before(end) {
				request, ok := take()
				if !ok {
					break
				}
				sent := time.Now()
				status, err := exchange(conn, reader, request)
				if err != nil || status >= 300 {
					failures++
					failure = fmt.Sprint(status, " ", err)
					if err != nil {
						break
					}
					continue
				}
				own = append(own, time.Since(sent))
			}
			mu.Lock()
			defer mu.Unlock()
			times = append(times, own...)
			if r.Failures += failures; r.Failure == "" {
				r.Failure = failure
			}
		})
	}
	group.Wait()
	r.Elapsed, r.Answers = time.Since(begun), len(times)
	if slices.Sort(times); len(times) > 0 {
		r.P50, r.P99 = times[len(times)/2], times[len(times)*99/100]
	}
	return json.NewEncoder(out).Encode(r)
}

// exchange sends a request and reads its answer, which must have a
// Content-Length.
func exchange(w io.Writer, r *bufio.Reader, request []byte) (status int, err error) {
	if _, err := w.Write(request); err != nil {
		return 0, err
	}
	length := -1
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return 0, err
		}
		if first && len(line) > 12 {
			status, _ = strconv.Atoi(string(line[9:12]))
		}
		if len(line) <= 2 {
			break
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	if length < 0 {
		return 0, fmt.Errorf("an answer %d without a Content-Length", status)
	}
	_, err = r.Discard(length)
	return status, err
}
