package test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// The rights of architecture.md are enough, and none of them is there for nothing:
// without one, the log names the command that was denied.
func TestRedisUserOfThePageIsEnough(t *testing.T) {
	t.Parallel()
	cache := newRedisServer(t)
	m := regexp.MustCompile("`(ACL SETUSER agentidp [^`]*)`").FindStringSubmatch(readPage(t, "architecture.md"))
	if m == nil {
		t.Fatal("architecture.md has no ACL SETUSER")
	}
	rights := strings.Fields(strings.Replace(m[1], "PASSWORD", "redis-password", 1))
	grant := func(words ...string) {
		t.Helper()
		var args []any
		for _, word := range words {
			args = append(args, word)
		}
		if err := cache.client.Do(t.Context(), args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	grant(rights...)
	unlimited := newProgram(t, newDatabase(t), "unix://agentidp:redis-password@"+cache.socket)
	p := unlimited.another("RATE_LIMIT_PER_MINUTE", "3", "MONTHLY_TOKEN_LIMIT", "5")
	id, secret := unlimited.quickClient("a:b")
	statuses := func() (list []int) {
		for range 5 {
			list = append(list, p.form(id, secret, "", "grant_type=client_credentials").status)
		}
		return list
	}
	if got := statuses(); !slices.Equal(got, []int{200, 200, 200, 429, 429}) {
		t.Errorf("with these rights, tokens are answered %v, want the limit", got)
	}
	for range 5 { // a right secret that is new to the copy is counted as a failure and given back
		another, right := unlimited.quickClient("a:b")
		p.want(p.form(another, right, "", "grant_type=client_credentials"), 200, "")
	}
	if failures := cache.client.Get(t.Context(), fmt.Sprintf("rate:ip:127.0.0.1:%d", time.Now().Unix()/60)).Val(); failures != "0" && failures != "" {
		t.Errorf("%s failures are counted of right secrets", failures)
	}
	for _, right := range rights {
		command, ok := strings.CutPrefix(right, "+")
		if !ok || slices.Contains([]string{"hello", "auth", "select", "ping", "eval", "decr"}, command) { // of connecting, of a script that is not there, of giving back
			continue
		}
		before := len(p.log.String())
		grant("ACL", "SETUSER", "agentidp", "-"+command)
		p.eventually("the log names "+command, func() bool {
			line := p.log.String()[before:]
			return strings.Contains(line, "NOPERM") && strings.Contains(strings.ToLower(line), "'"+command)
		})
		before = len(p.log.String())
		grant("ACL", "SETUSER", "agentidp", "+"+command)
		p.eventually("it is well again", func() bool { return strings.Contains(p.log.String()[before:], `"of":"redis","well":true`) })
	}
	// A full one is told from one that is gone.
	before := len(p.log.String())
	grant("CONFIG", "SET", "maxmemory", "1")
	p.eventually("the log says that it is full", func() bool { return strings.Contains(p.log.String()[before:], "OOM command not allowed") })
}

// Where both stores are gone, each is said to be.
func TestEachStoreIsJudgedByItsOwnAnswers(t *testing.T) {
	t.Parallel()
	postgres, cache := newPostgres(t), newRedisServer(t)
	p := newProgram(t, postgres.url(), cache.url())
	says := func(want string) {
		t.Helper()
		p.eventually(want, func() bool { return strings.Contains(p.do("GET", "/readyz", "").raw, want) })
	}
	says(`"postgres":"up","redis":"up"`)
	postgres.kill()
	says(`"postgres":"down","redis":"up"`)
	cache.process.kill()
	says(`"postgres":"down","redis":"down"`)
	cache.start()
	says(`"postgres":"down","redis":"up"`)
	postgres.start()
	says(`"postgres":"up","redis":"up"`)
}

// Sentinels name another master, and limits go on there.
func TestLimitsOutliveAFailOverBySentinels(t *testing.T) {
	t.Parallel()
	folder := privateFolder(t)
	redisAt := func(port string, args ...string) *process {
		t.Helper()
		args = append([]string{"--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", ""}, args...)
		p := startProcess(t, exec.Command("redis-server", args...), syscall.SIGKILL)
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + port, MaxRetries: -1})
		defer client.Close()
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			if err := client.Ping(context.Background()).Err(); err == nil || strings.HasPrefix(err.Error(), "NOAUTH") {
				return p
			}
			if time.Now().After(end) {
				t.Fatal("a Redis of the test's own does not start")
			}
		}
	}
	const password = "p@ss/w#rd"
	master, replica := steadyPort(t), steadyPort(t)
	first := redisAt(master, "--requirepass", password, "--masterauth", password)
	redisAt(replica, "--requirepass", password, "--masterauth", password, "--replicaof", "127.0.0.1 "+master)
	var sentinels []string
	for i := range 3 {
		port := steadyPort(t)
		config := fmt.Sprintf("%s/sentinel%d.conf", folder, i)
		settings := fmt.Sprintf("port %s\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 %s 2\nsentinel auth-pass main \"%s\"\n"+
			"sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n", port, master, password)
		if err := os.WriteFile(config, []byte(settings), 0o600); err != nil {
			t.Fatal(err)
		}
		startProcess(t, exec.Command("redis-server", config, "--sentinel"), syscall.SIGKILL)
		sentinels = append(sentinels, "127.0.0.1:"+port)
	}
	unlimited := newProgram(t, newDatabase(t), newRedis(t))
	p := unlimited.another("RATE_LIMIT_PER_MINUTE", "3", "REDIS_URL", fmt.Sprintf("redis://%s/0?addr=%s&addr=%s&master_name=main&password=%s",
		sentinels[0], sentinels[1], sentinels[2], url.QueryEscape(password)))
	limits := func() bool {
		id, secret := unlimited.quickClient("a:b")
		for range 12 {
			if p.form(id, secret, "", "grant_type=client_credentials").status == 429 {
				return true
			}
		}
		return false
	}
	p.eventually("requests are limited", limits)
	sentinel := redis.NewSentinelClient(&redis.Options{Addr: sentinels[0]})
	defer sentinel.Close()
	p.eventually("the Sentinels know the replica and each other", func() bool {
		replicas, err := sentinel.Replicas(t.Context(), "main").Result()
		others, err2 := sentinel.Sentinels(t.Context(), "main").Result()
		return err == nil && err2 == nil && len(replicas) == 1 && replicas[0]["master-link-status"] == "ok" && len(others) == 2
	})
	first.kill()
	p.eventually("another is the master", func() bool {
		addr, err := sentinel.GetMasterAddrByName(t.Context(), "main").Result()
		return err == nil && addr[1] == replica
	})
	p.eventually("requests are limited again", limits)
}
