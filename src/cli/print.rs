//! What commands write: nothing that a terminal would obey, and an end without noise when nobody reads on.

use std::io::{ErrorKind, Write};
use std::process::exit;

use serde_json::Value;

/// What a shell reports of a command that SIGPIPE ended: 128 + 13.
const BROKEN_PIPE: i32 = 141;

/// Writes to standard output. Ends the process when that cannot be written to.
pub(super) fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        if error.kind() == ErrorKind::BrokenPipe {
            exit(BROKEN_PIPE); // As `head` ends other tools.
        }
        complain(&format!("jwksd: standard output cannot be written: {error}\n"));
        exit(1);
    }
}

/// Writes to standard error, where nobody may listen.
pub(super) fn complain(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Text from elsewhere on one line, with control characters and changes of direction written out: a terminal obeys none.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if obeyed(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// As [`plain`], for text that has lines.
pub(super) fn plain_lines(text: &str) -> String {
    text.split('\n').map(plain).collect::<Vec<_>>().join("\n")
}

/// Pretty JSON in which nothing is left that a terminal obeys; JSON itself escapes only a part of it (RFC 8259 §7).
pub(super) fn json_text(value: &Value) -> String {
    let text = format!("{value:#}");
    let escape = |c: char| match c {
        '\n' => c.to_string(),
        c if obeyed(c) => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

/// Control characters (C0, DEL, C1) and those that reorder what follows (UAX #9).
fn obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_printed() {
        let hostile = "a\u{1b}[2J\nb\u{9b}1m\u{7f}\r\u{202e}c ü";
        assert_eq!(plain(hostile), "a\\u{1b}[2J\\nb\\u{9b}1m\\u{7f}\\r\\u{202e}c ü");
        let text = json_text(&serde_json::json!({ hostile: hostile }));
        assert!(!text.contains(|c: char| obeyed(c) && c != '\n'), "{text:?}");
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap()[hostile], hostile);
    }
}
