#!/bin/sh
# Lays out what the image contains: `rootfs.sh BINARY FOLDER`. The folder must not exist. Used by the Dockerfile, and by
# who brings a binary of their own; for a Linux with ldd and a bundle of certificate authorities.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 BINARY FOLDER" >&2
    exit 2
fi
binary=$1
root=$2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
repository=$(CDPATH='' cd -- "$here/../.." && pwd)

[ -x "$binary" ] || { echo "$0: $binary is not an executable: build it, with cargo build --release" >&2; exit 1; }
[ ! -e "$root" ] || { echo "$0: $root exists already: remove it, or name another folder" >&2; exit 1; }

umask 022
mkdir -p "$root/usr/bin" "$root/usr/share/doc/jwksd" "$root/lib" "$root/lib64" "$root/etc/ssl/certs" "$root/etc/jwksd" \
    "$root/var/lib" "$root/run" "$root/empty"
install -m 0755 "$binary" "$root/usr/bin/jwksd"
install -m 0644 "$repository/LICENSE-APACHE" "$repository/LICENSE-MIT" "$root/usr/share/doc/jwksd/"
install -m 0644 "$here/jwksd.toml" "$root/etc/jwksd/"

# The loader and the libraries, where the program looks for them; a static program has none.
ldd "$binary" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$root$(dirname "$library")"
    # Those outside are links to them in some distributions.
    install -m 0755 "$(readlink -f "$library")" "$root$library"
done
# Theirs to be named.
for notice in /usr/share/doc/libc6/copyright /usr/share/doc/libgcc-s1/copyright; do
    [ ! -e "$notice" ] || install -D -m 0644 "$notice" "$root$notice"
done

# Authorities, for probes, object stores, AWS and databases.
for bundle in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem; do
    [ -n "$bundle" ] && [ -r "$bundle" ] || continue
    install -m 0644 "$bundle" "$root/etc/ssl/certs/ca-certificates.crt"
    break
done
[ -e "$root/etc/ssl/certs/ca-certificates.crt" ] ||
    { echo "$0: no bundle of certificate authorities here: install ca-certificates, or set SSL_CERT_FILE" >&2; exit 1; }

# For people who look at processes and files; the program knows numbers only.
printf 'root:x:0:0:root:/:/\njwksd:x:65532:65532:jwksd:/var/lib/jwksd:/\n' >"$root/etc/passwd"
printf 'root:x:0:\njwksd:x:65532:\n' >"$root/etc/group"
