// Prints a token of jwksd for each subject (a line of standard input), asked for over the signer's Unix socket, as in
// `echo alice | go run client.go /run/jwksd/signer.sock default https://api.example.com`.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"time"
)

const attempt, patience = 3 * time.Second, 30 * time.Second // for one answer, for a token

// sign asks until there is a token: again when the daemon cannot be reached, and when it says "not now" (503).
func sign(client *http.Client, keyset string, claims map[string]any) (token string, err error) {
	body, _ := json.Marshal(map[string]any{"claims": claims, "ttl": "5m"})
	url, pause := "http://localhost/v1/keysets/"+keyset+"/sign", time.Duration(0)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(pause) {
		pause = 500 * time.Millisecond
		var response *http.Response
		if response, err = client.Post(url, "application/json", bytes.NewReader(body)); err != nil {
			continue
		}
		var answer struct{ Token, Type, Detail string }
		err = json.NewDecoder(response.Body).Decode(&answer)
		response.Body.Close()
		if response.StatusCode == http.StatusOK && err == nil {
			return answer.Token, nil
		}
		err = fmt.Errorf("%s: %s %s", response.Status, answer.Type, answer.Detail)
		if response.StatusCode != http.StatusServiceUnavailable {
			return "", err // our request is wrong: asking again does not help
		}
		if asked, bad := time.ParseDuration(response.Header.Get("Retry-After") + "s"); bad == nil {
			pause = asked
		}
	}
	return "", err
}

func main() {
	socket, keyset, audience := os.Args[1], os.Args[2], os.Args[3]
	dial := func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }
	client := &http.Client{Timeout: attempt, Transport: &http.Transport{DialContext: dial}} // dials again after a restart
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		token, err := sign(client, keyset, map[string]any{"sub": lines.Text(), "aud": audience})
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(token)
	}
}
