package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// What stands on both sides of the proxies in rolling.go and in revocations.go.

// certify makes a certificate for localhost, crt.pem and key.pem in a folder, and who trusts it.
func certify(dir string) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	crt, private := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(crt)
	return &tls.Config{RootCAs: pool}, writeFiles(dir, map[string]string{"crt.pem": string(crt), "key.pem": string(private), "both.pem": string(crt) + string(private)})
}

// A relay is a way to somewhere, which can be cut, and can hang.
type relay struct {
	net.Listener
	dial func() (net.Conn, error)
	mu   sync.Mutex
	gone bool
	open map[net.Conn]chan struct{} // closed where bytes pass on
	next chan struct{}              // that of the next connection
	idle time.Duration              // after which a side that says nothing has it cut; 0 is never
	cuts int                        // for that
}

func newRelay(dial func() (net.Conn, error)) (*relay, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{Listener: listener, dial: dial, open: map[net.Conn]chan struct{}{}, next: make(chan struct{})}
	close(r.next)
	go r.serve()
	return r, nil
}

// openRelay returns the URL of the database by way of the relay.
func openRelay() (*relay, string, error) {
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		return nil, "", errors.New("DATABASE_URL is no URL")
	}
	q := u.Query() // as dev/with-services.sh makes it
	socket := filepath.Join(q.Get("host"), ".s.PGSQL."+q.Get("port"))
	if u.Host != "" || q.Get("host") == "" || q.Get("user") == "" {
		return nil, "", errors.New("DATABASE_URL is no socket's")
	}
	r, err := newRelay(func() (net.Conn, error) { return net.Dial("unix", socket) })
	if err != nil {
		return nil, "", err
	}
	return r, "postgres://" + q.Get("user") + "@" + r.Addr().String() + u.Path + "?sslmode=disable", nil
}

func (r *relay) serve() {
	for {
		in, err := r.Accept()
		if err != nil {
			return
		}
		out, err := r.dial()
		r.mu.Lock()
		if err != nil || r.gone {
			in.Close()
			if out != nil {
				out.Close()
			}
			r.mu.Unlock()
			continue
		}
		r.open[in], r.open[out] = r.next, r.next
		r.mu.Unlock()
		go r.pass(in, out)
		go r.pass(out, in)
	}
}

// pass passes on what one side says, until there is no more.
func (r *relay) pass(to, from net.Conn) {
	var err error
	for b := make([]byte, 32<<10); err == nil; {
		r.mu.Lock()
		end := time.Time{}
		if r.idle > 0 {
			end = time.Now().Add(r.idle)
		}
		r.mu.Unlock()
		from.SetReadDeadline(end)
		var n int
		n, err = from.Read(b)
		r.mu.Lock()
		moves := r.open[from]
		r.mu.Unlock()
		if moves != nil {
			<-moves
		}
		if _, failed := to.Write(b[:n]); err == nil {
			err = failed
		}
	}
	to.Close()
	from.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	if delete(r.open, from); errors.Is(err, os.ErrDeadlineExceeded) {
		r.cuts++
	}
}

// hang stops the bytes of the connections that are open, and of those to come if these are to; what it returns lets them go on.
func (r *relay) hang(others bool) (release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	moves := make(chan struct{})
	for conn := range r.open {
		r.open[conn] = moves
	}
	if others {
		r.next = moves
	}
	return func() { close(moves) }
}

func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone = true
	for conn := range r.open {
		conn.Close()
	}
}

func (r *relay) mend() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone = false
}
