//! The last line of defence against secrets in logs: every line is searched for what looks like one before it is
//! written.
//!
//! Nothing may rely on it. Secret types redact themselves and no code logs a token; this is for libraries at trace
//! level and for mistakes. It knows compact JWSs, bearer credentials, PEM private keys and the private members of JWKs.

use std::borrow::Cow;
use std::io::{self, Write};
use std::ops::Range;

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Replaces each secret in `line` by a word that says what was there. Borrowed when there is none.
///
/// The result is valid UTF-8 where `line` was, and valid JSON where `line` was.
pub fn redact(line: &[u8]) -> Cow<'_, [u8]> {
    let mut clean = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    while at < line.len() {
        match secret_at(line, at) {
            Some(secret) => {
                clean.extend_from_slice(&line[copied..secret.range.start]);
                clean.extend_from_slice(secret.replacement);
                copied = secret.range.end;
                at = secret.range.end;
            }
            None => at += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(line);
    }
    clean.extend_from_slice(&line[copied..]);
    Cow::Owned(clean)
}

/// A writer whose every `write` is redacted. Meant for writers that are handed whole lines, as tracing-subscriber's
/// are: a secret split over two calls is not found.
#[derive(Clone, Debug)]
pub struct Redacting<W>(pub W);

impl<W: Write> Write for Redacting<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write_all(&redact(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for Redacting<M> {
    type Writer = Redacting<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        Redacting(self.0.make_writer())
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Self::Writer {
        Redacting(self.0.make_writer_for(metadata))
    }
}

struct Secret {
    /// What is replaced; never empty.
    range: Range<usize>,
    replacement: &'static [u8],
}

/// The secret that begins at `at`. Looks at one byte where there is none.
fn secret_at(line: &[u8], at: usize) -> Option<Secret> {
    match line[at] {
        b'e' => compact_jws(line, at),
        b'b' | b'B' => bearer(line, at),
        b'-' => pem_private_key(line, at),
        b'"' => private_jwk_member(line, at),
        _ => None,
    }
}

/// `eyJ` is the base64url of `{"`: a JOSE header. With a dot and more behind it, it is a token or its signing input.
fn compact_jws(line: &[u8], at: usize) -> Option<Secret> {
    if !line[at..].starts_with(b"eyJ") {
        return None;
    }
    let header_end = word(line, at, is_base64url);
    let end = word(line, at, |c| is_base64url(c) || c == b'.');
    let two_parts = line.get(header_end) == Some(&b'.') && line.get(header_end + 1).copied().is_some_and(is_base64url);
    two_parts.then_some(Secret { range: at..end, replacement: b"[redacted JWS]" })
}

/// RFC 6750 §2.1; the scheme's name in any case. Prose about bearer tokens is left readable.
fn bearer(line: &[u8], at: usize) -> Option<Secret> {
    const SCHEME: &[u8] = b"bearer ";
    if !line.get(at..at + SCHEME.len())?.eq_ignore_ascii_case(SCHEME) {
        return None;
    }
    let start = run(line, at + SCHEME.len(), |c| c == b' ');
    let end = word(line, start, |c| is_base64url(c) || matches!(c, b'.' | b'~' | b'+' | b'/' | b'='));
    let word = &line[start..end];
    let prose = [&b"token"[..], b"tokens", b"authentication", b"credentials"];
    let secret = !word.is_empty() && !prose.iter().any(|w| word.strip_suffix(b".").unwrap_or(word) == *w);
    secret.then_some(Secret { range: start..end, replacement: b"[redacted]" })
}

/// RFC 7468 §10 and its relatives (`RSA`, `EC`, `ENCRYPTED`, `OPENSSH`). One that is cut off is redacted as far as it
/// goes: to the closing quote or to the end.
fn pem_private_key(line: &[u8], at: usize) -> Option<Secret> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    const LABEL: &[u8] = b"PRIVATE KEY";
    const DASHES: &[u8] = b"-----";
    let rest = &line[at..];
    if !rest.starts_with(BEGIN) {
        return None;
    }
    let label_end = run(rest, BEGIN.len(), |c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b' ');
    find(&rest[..label_end], LABEL)?;
    // Never beyond the quotes around it, or the line would not be JSON any more.
    let body_end = run(rest, label_end, |c| c != b'"');
    let body = &rest[label_end..body_end];
    let ended = find(body, b"-----END ").map(|end| end + DASHES.len()).and_then(|end| {
        let dashes = find(&body[end..], DASHES)?;
        Some(end + dashes + DASHES.len())
    });
    // The backslash of an escaped quote, and the newline that ends the log line, belong to the line.
    let cut_off = || body.iter().rposition(|c| !matches!(c, b'\\' | b'\n')).map_or(0, |last| last + 1);
    let end = label_end + ended.unwrap_or_else(cut_off);
    Some(Secret { range: at..at + end, replacement: b"[redacted private key]" })
}

/// A member that only private and symmetric JWKs have (RFC 7518 §6.2.2, §6.3.2, §6.4.1; RFC 9964), with a value as long
/// as a key's; quotes may be escaped, as they are in JSON within a JSON log line.
fn private_jwk_member(line: &[u8], at: usize) -> Option<Secret> {
    const MEMBERS: [&[u8]; 8] = [b"d", b"p", b"q", b"dp", b"dq", b"qi", b"k", b"priv"];
    let name_end = run(line, at + 1, |c| c.is_ascii_lowercase());
    if !MEMBERS.contains(&&line[at + 1..name_end]) {
        return None;
    }
    let spaces = |at| run(line, at, |c| matches!(c, b' ' | b'\t'));
    let quote = |at| {
        let quote = run(line, at, |c| c == b'\\');
        (line.get(quote) == Some(&b'"')).then_some(quote + 1)
    };
    let colon = spaces(quote(name_end)?);
    if line.get(colon) != Some(&b':') {
        return None;
    }
    let start = quote(spaces(colon + 1))?;
    let end = word(line, start, |c| is_base64url(c) || c == b'=');
    (end - start >= 20).then_some(Secret { range: start..end, replacement: b"[redacted]" })
}

/// As [`run`], but not into a PEM block, whose dashes are base64url characters too.
fn word(line: &[u8], at: usize, wanted: impl Fn(u8) -> bool) -> usize {
    let end = run(line, at, wanted);
    find(&line[at..end], b"-----BEGIN").map_or(end, |dashes| at + dashes)
}

/// The end of the bytes from `at` on that satisfy `wanted`.
fn run(line: &[u8], at: usize, wanted: impl Fn(u8) -> bool) -> usize {
    line[at..].iter().position(|&c| !wanted(c)).map_or(line.len(), |n| at + n)
}

fn find(line: &[u8], wanted: &[u8]) -> Option<usize> {
    line.windows(wanted.len()).position(|window| window == wanted)
}

const fn is_base64url(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const JWS: &str = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl-_";
    const PEM: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIA\nabc=\n-----END PRIVATE KEY-----";

    fn clean(line: &str) -> String {
        String::from_utf8(redact(line.as_bytes()).into_owned()).unwrap()
    }

    #[test]
    fn tokens_and_credentials_are_replaced_and_the_rest_stays() {
        let truncated = &JWS[..30];
        for (line, expected) in [
            (format!("token={JWS} kid=a"), "token=[redacted JWS] kid=a"),
            (format!("{JWS},{JWS}"), "[redacted JWS],[redacted JWS]"),
            (format!("x{JWS}"), "x[redacted JWS]"),
            (format!(r#"{{"t":"{truncated}"}}"#), r#"{"t":"[redacted JWS]"}"#),
            ("authorization: Bearer abc.DEF~1+/=".into(), "authorization: Bearer [redacted]"),
            ("AUTHORIZATION: bearer   s3cret, x".into(), "AUTHORIZATION: bearer   [redacted], x"),
            (format!(r#""Bearer {JWS}""#), r#""Bearer [redacted]""#),
            ("a\u{e9} Bearer s3cret \u{e9}".into(), "a\u{e9} Bearer [redacted] \u{e9}"),
        ] {
            assert_eq!(clean(&line), expected);
        }
    }

    #[test]
    fn private_keys_are_replaced_in_every_spelling() {
        let escaped = PEM.replace('\n', "\\n");
        let ec = PEM.replace("PRIVATE", "EC PRIVATE");
        let cut = &PEM[..40];
        for (line, expected) in [
            (format!("key {PEM} end\n"), "key [redacted private key] end\n".to_owned()),
            (format!("key {ec} end"), "key [redacted private key] end".into()),
            (format!(r#"{{"k":"{escaped}"}}"#), r#"{"k":"[redacted private key]"}"#.into()),
            (format!(r#"{{"k":"\"{cut}\"","x":1}}"#), r#"{"k":"\"[redacted private key]\"","x":1}"#.into()),
            (format!("cut {cut}\n"), "cut [redacted private key]\n".into()),
            (format!(r#"{{"d": "{}"}}"#, "a".repeat(43)), r#"{"d": "[redacted]"}"#.into()),
            (format!(r#"{{\"qi\":\"{}\"}}"#, "a".repeat(43)), r#"{\"qi\":\"[redacted]\"}"#.into()),
        ] {
            assert_eq!(clean(&line), expected);
        }
    }

    #[test]
    fn what_is_no_secret_is_not_touched() {
        for line in [
            "",
            "eyJ",
            "eyJhbGciOiJFUzI1NiJ9",
            "eyJhbGciOiJFUzI1NiJ9. A sentence.",
            "a bearer token is missing",
            "needs a bearer token.",
            "Bearer ",
            "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----",
            "-----BEGIN ",
            "-----",
            r#"{"d":"short"}"#,
            r#"{"kid":"NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"}"#,
            "\"",
            "\"d\"",
            "\"d\":\\",
        ] {
            assert!(matches!(redact(line.as_bytes()), Cow::Borrowed(_)), "{line} was changed to {}", clean(line));
        }
    }

    proptest! {
        #[test]
        fn redaction_never_panics_and_leaves_nothing_for_a_second_pass(
            parts in proptest::collection::vec(
                prop_oneof![
                    Just(JWS.to_owned()), Just(PEM.to_owned()), Just("Bearer ".to_owned()), Just("eyJ".to_owned()),
                    Just("-----BEGIN ".to_owned()), Just("\"d\":\"".to_owned()), Just("\\".to_owned()), "\\PC{0,9}",
                ],
                0..8,
            ),
        ) {
            let line = parts.concat();
            let once = clean(&line);
            prop_assert!(!once.contains(JWS));
            prop_assert!(!once.contains("MC4CAQAwBQYDK2VwBCIEIA"));
        }

        #[test]
        fn a_json_line_stays_json(text in "\\PC{0,20}", secret in prop_oneof![Just(JWS), Just(PEM), Just(&PEM[..45])]) {
            let inner = serde_json::json!({ "d": text, "x": secret, "y": format!("{text}{secret}") }).to_string();
            let line = serde_json::json!({ "message": inner, "text": text, "secret": secret, "z": PEM }).to_string();
            let redacted = clean(&line);
            prop_assert!(serde_json::from_str::<serde_json::Value>(&redacted).is_ok(), "{}", redacted);
        }
    }
}
