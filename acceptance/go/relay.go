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
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// What stands on both sides of the proxies in rolling.go.

// certify makes a certificate for localhost, which clients here trust.
func (f *front) certify() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	crt, private := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(crt)
	f.trust = &tls.Config{RootCAs: pool}
	return writeFiles(f.dir, map[string]string{"crt.pem": string(crt), "key.pem": string(private), "both.pem": string(crt) + string(private)})
}

// A relay is the way of the copies to PostgreSQL, which can be cut.
type relay struct {
	net.Listener
	mu   sync.Mutex
	gone bool
	open map[net.Conn]bool
}

// openRelay returns the URL of the database by way of the relay.
func (f *front) openRelay() (string, error) {
	u, err := url.Parse(os.Getenv("DATABASE_URL"))
	if err != nil {
		return "", errors.New("DATABASE_URL is no URL")
	}
	q := u.Query() // as dev/with-services.sh makes it
	socket := filepath.Join(q.Get("host"), ".s.PGSQL."+q.Get("port"))
	if u.Host, err = "", nil; q.Get("host") == "" || q.Get("user") == "" {
		return "", errors.New("DATABASE_URL is no socket's")
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	f.relay = &relay{Listener: listener, open: map[net.Conn]bool{}}
	go f.relay.serve(socket)
	return "postgres://" + q.Get("user") + "@" + listener.Addr().String() + u.Path + "?sslmode=disable", nil
}

func (r *relay) serve(socket string) {
	for {
		in, err := r.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("unix", socket)
		r.mu.Lock()
		if err != nil || r.gone {
			in.Close()
			if out != nil {
				out.Close()
			}
			r.mu.Unlock()
			continue
		}
		r.open[in], r.open[out] = true, true
		r.mu.Unlock()
		pass := func(to, from net.Conn) {
			io.Copy(to, from)
			to.Close()
			from.Close()
			r.mu.Lock()
			delete(r.open, to)
			r.mu.Unlock()
		}
		go pass(in, out)
		go pass(out, in)
	}
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
