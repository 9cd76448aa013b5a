package main

import (
	"context"
	"encoding/base64"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tryNginx has nginx ask the service about each token: auth_request, and njs to
// read the answer, since its status is 200 whatever the token is.
func tryNginx(ctx context.Context, w *world, c client) {
	service, err := w.agent(ctx, "tokens:read")
	if err != nil {
		c.checked("has a client that may introspect", err)
		return
	}
	port, err := freePort()
	if err != nil {
		c.checked("has a port", err)
		return
	}
	dir := filepath.Join(w.dir, "nginx")
	err = writeFiles(dir, map[string]string{
		"htdocs/resumes": "two resumes\n",
		"introspect.js": `
async function introspect(r) {
	const token = (r.headersIn.Authorization || '').match(/^Bearer ([A-Za-z0-9._~+/-]+=*)$/i);
	if (!token) return r.return(401);
	const reply = await r.subrequest('/_introspection_request', { method: 'POST', body: 'token=' + encodeURIComponent(token[1]) });
	if (reply.status != 200) return r.return(500);
	const is = JSON.parse(reply.responseText);
	if (is.active !== true || is.cnf || [].concat(is.aud).indexOf('` + resource + `') < 0) return r.return(401);
	r.return(is.scope.split(' ').indexOf('resumes:read') < 0 ? 403 : 204);
}
export default { introspect };
`,
		"nginx.conf": fill(`
load_module modules/ngx_http_js_module.so;
daemon off;
master_process off;
pid DIR/pid;
error_log DIR/error.log;
events {}
http {
	access_log off;
	client_body_temp_path DIR/body;
	proxy_temp_path DIR/proxy;
	fastcgi_temp_path DIR/fastcgi;
	uwsgi_temp_path DIR/uwsgi;
	scgi_temp_path DIR/scgi;
	js_path DIR;
	js_import introspect.js;
	server {
		listen 127.0.0.1:PORT;
		location / {
			auth_request /_introspect;
			root DIR/htdocs;
		}
		location = /_introspect {
			internal;
			js_content introspect.introspect;
		}
		location = /_introspection_request {
			internal;
			proxy_pass BASE/api/v1/token/introspect;
			proxy_set_header Authorization "Basic BASIC";
			proxy_set_header Content-Type application/x-www-form-urlencoded;
		}
	}
}
`, "DIR", dir, "PORT", port, "BASIC", base64.StdEncoding.EncodeToString([]byte(service.ID+":"+service.Secret)), "BASE", w.base),
	})
	if err != nil {
		c.checked("is configured", err)
		return
	}
	p, err := w.start("nginx", exec.Command(program("nginx"), "-p", "/usr/share/nginx/", "-e", dir+"/error.log", "-c", dir+"/nginx.conf"))
	if err != nil {
		c.checked("starts", err)
		return
	}
	defer p.stop()
	c.protects(ctx, w, p, "http://127.0.0.1:"+port+"/resumes", true)
}

// tryApache has Apache ask the service about each token, or verify it by the
// published keys.
func tryApache(ctx context.Context, w *world, c client) {
	for _, way := range []struct {
		name, verify string
		asks         bool
	}{
		{"introspection", "introspect BASE/api/v1/token/introspect introspect.auth=client_secret_basic&client_id=ID&client_secret=SECRET&expiry=0", true},
		{"metadata", "metadata BASE/.well-known/oauth-authorization-server", false},
	} {
		c := client{c.report, c.name + ", " + way.name}
		service, err := w.agent(ctx, "tokens:read")
		if err != nil {
			c.checked("has a client that may introspect", err)
			return
		}
		port, err := freePort()
		if err != nil {
			c.checked("has a port", err)
			return
		}
		dir := filepath.Join(w.dir, "apache-"+way.name)
		asRoot := ""
		if os.Getuid() == 0 {
			asRoot = "User nobody\nGroup nogroup"
		}
		err = writeFiles(dir, map[string]string{
			"htdocs/resumes": "two resumes\n",
			"apache.conf": fill(`
ServerName localhost
ServerRoot DIR
Listen 127.0.0.1:PORT
PidFile DIR/pid
DefaultRuntimeDir DIR
Mutex file:DIR default
ErrorLog DIR/error.log
ROOT
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authn_core_module /usr/lib/apache2/modules/mod_authn_core.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule authz_user_module /usr/lib/apache2/modules/mod_authz_user.so
LoadModule oauth2_module /usr/lib/apache2/modules/mod_oauth2.so
StartServers 1
ThreadsPerChild 8
MaxRequestWorkers 8
DocumentRoot DIR/htdocs
<Location />
	AuthType oauth2
	OAuth2TokenVerify VERIFY
	<RequireAll>
		Require oauth2_claim iss:BASE
		Require oauth2_claim aud:RESOURCE
		Require oauth2_claim scope:resumes:read
		<RequireNone>
			Require env OAUTH2_CLAIM_cnf
		</RequireNone>
	</RequireAll>
	AuthzSendForbiddenOnFailure On
</Location>
`, "VERIFY", way.verify, "DIR", dir, "PORT", port, "ROOT", asRoot, "RESOURCE", resource,
				"BASE", w.base, "ID", service.ID, "SECRET", service.Secret),
		})
		if err != nil {
			c.checked("is configured", err)
			return
		}
		p, err := w.start("apache-"+way.name, exec.Command(program("apache2"), "-D", "FOREGROUND", "-f", dir+"/apache.conf"))
		if err != nil {
			c.checked("starts", err)
			return
		}
		c.protects(ctx, w, p, "http://127.0.0.1:"+port+"/resumes", way.asks)
		p.stop()
	}
}

// protects tries a web server that lets only tokens in.
func (c client) protects(ctx context.Context, w *world, p *process, url string, asks bool) {
	if !c.checked("starts", p.ready(ctx, url, http.StatusUnauthorized)) {
		return
	}
	t, err := w.tokensFor(ctx, resource)
	if err != nil {
		c.checked("has tokens", err)
		return
	}
	c.guards(t, abilities{types: asks, revocations: asks}, askWith(ctx, url))
}

// askWith asks a resource server with a token, "" for none, and returns the
// status of its answer.
func askWith(ctx context.Context, url string) func(token string) (int, error) {
	return func(token string) (int, error) {
		r, err := http.NewRequestWithContext(ctx, "GET", url, nil)
		if err != nil {
			return 0, err
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			return 0, err
		}
		answer.Body.Close()
		return answer.StatusCode, nil
	}
}

// program finds a program that may be where only root looks.
func program(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	return "/usr/sbin/" + name
}

// fill puts values in the place of names.
func fill(text string, pairs ...string) string {
	for i := 0; i < len(pairs); i += 2 {
		text = strings.ReplaceAll(text, pairs[i], pairs[i+1])
	}
	return text
}

// writeFiles writes files that a server which gives up root can read.
func writeFiles(dir string, files map[string]string) error {
	for name, text := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
