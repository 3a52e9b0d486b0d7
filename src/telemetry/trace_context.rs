//! W3C Trace Context: which trace a request belongs to, as its caller says in `traceparent`.

use std::fmt;

/// A `traceparent` (W3C Trace Context §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace_id: TraceId,
    /// The caller's span.
    pub span_id: [u8; 8],
    /// The caller records its part of the trace.
    pub sampled: bool,
}

/// The number of a trace; shown as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceId(pub [u8; 16]);

impl TraceParent {
    /// `None` for what the standard says to ignore: other lengths, capitals, numbers that are all zero, version `ff`. Of a
    /// later version only what this one defines is read.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let version: [u8; 1] = hex(parts.next()?)?;
        let (trace, span, [flags]) = (hex(parts.next()?)?, hex(parts.next()?)?, hex(parts.next()?)?);
        let ends = parts.next().is_none();
        let valid = version != [0xff] && (ends || version != [0]) && trace != [0; 16] && span != [0; 8];
        valid.then_some(TraceParent { trace_id: TraceId(trace), span_id: span, sampled: flags & 1 == 1 })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let span = u64::from_be_bytes(self.span_id);
        write!(f, "00-{}-{span:016x}-{:02x}", self.trace_id, u8::from(self.sampled))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Exactly `N` bytes in lower-case digits.
fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn the_example_of_the_standard_is_read_and_written() {
        let parsed = TraceParent::parse(EXAMPLE).unwrap();
        assert_eq!(parsed.trace_id.to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(parsed.sampled);
        assert_eq!(parsed.to_string(), EXAMPLE);
        let later = format!("cc{}-what-will-be", &EXAMPLE[2..]);
        assert_eq!(TraceParent::parse(&later), Some(parsed));
    }

    #[test]
    fn what_is_no_traceparent_is_ignored() {
        let zero = "00-00000000000000000000000000000000-00f067aa0ba902b7-01";
        let wrong =
            [EXAMPLE.to_uppercase(), format!("{EXAMPLE}-x"), format!("ff{}", &EXAMPLE[2..]), EXAMPLE.replace('b', "é")];
        for text in wrong.iter().map(String::as_str).chain([zero, "", "00", &EXAMPLE[..54]]) {
            assert_eq!(TraceParent::parse(text), None, "{text}");
        }
    }
}
