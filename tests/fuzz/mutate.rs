//! Changes inputs: bytes and lines for everything, tokens for TOML and JSON, base64 and the DER in it for keys and tokens.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use jwksd::simulation::random::Random;

/// Texts that parsers stumble over.
const WORDS: [&str; 48] = [
    "",
    "0",
    "-1",
    "1",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "1e999",
    "0.1",
    "-0",
    "1e400",
    "2147483648",
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\\",
    "\"",
    "'",
    "\n",
    "\r\n",
    "\t",
    "\u{0}",
    "\u{1b}[31m",
    "\u{202e}",
    "é",
    "ſ",
    "\u{feff}",
    "😀",
    "none",
    "HS256",
    "RS256",
    "ES256",
    "EdDSA",
    "0s",
    "1ms",
    "30d",
    "9999999999d",
    "@yearly",
    "*/2",
    "0 0 30 2 *",
    "1970-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "AAAA",
];

/// `input` with one to a few changes; `other` is what pieces are taken from.
pub fn mutate(input: &[u8], other: &[u8], longest: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(3) {
        bytes = match random.below(12) {
            0 | 1 => change_bytes(bytes, random),
            2 | 3 => change_lines(bytes, other, random),
            4..=6 => change_tokens(&bytes, other, random),
            7 | 8 => change_base64(bytes, random),
            9 => change_number(bytes, random),
            10 => insert_word(bytes, random),
            _ => splice(bytes, other, random),
        };
        bytes.truncate(longest);
    }
    bytes
}

fn place(bytes: &[u8], random: &mut Random) -> usize {
    random.index(bytes.len() + 1)
}

/// A piece, mostly a short one.
fn range(bytes: &[u8], random: &mut Random) -> std::ops::Range<usize> {
    let from = place(bytes, random);
    let most = if random.below(4) == 0 { bytes.len() - from } else { 8.min(bytes.len() - from) };
    from..from + random.index(most + 1)
}

fn change_bytes(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    let range = range(&bytes, random);
    match random.below(5) {
        0 if !bytes.is_empty() => {
            let at = random.index(bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        1 if !bytes.is_empty() => {
            let at = random.index(bytes.len());
            bytes[at] = random.draw() as u8;
        }
        2 => drop(bytes.drain(range)),
        3 => {
            let piece = bytes[range.clone()].to_vec();
            let times = if random.below(8) == 0 { 400 } else { 1 };
            for _ in 0..times {
                bytes.splice(range.start..range.start, piece.iter().copied());
            }
        }
        _ => bytes.truncate(range.start),
    }
    bytes
}

fn change_lines(bytes: Vec<u8>, other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut lines: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let theirs: Vec<&[u8]> = other.split(|byte| *byte == b'\n').collect();
    let (at, with) = (random.index(lines.len()), random.index(lines.len()));
    match random.below(5) {
        0 => lines.swap(at, with),
        1 => drop(lines.remove(at)),
        2 => {
            let line = lines[at].clone();
            lines.insert(with, line);
        }
        3 => lines.insert(at, theirs[random.index(theirs.len())].to_vec()),
        _ => lines[at] = theirs[random.index(theirs.len())].to_vec(),
    }
    lines.join(&b'\n')
}

/// Pieces of TOML, JSON, crontab and compact tokens: words, texts in quotes, single signs.
fn tokens(bytes: &[u8]) -> Vec<&[u8]> {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+' | b'/' | b':') || byte >= 0x80;
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = if rest[0] == b'"' {
            let end = rest[1..].iter().position(|byte| matches!(byte, b'"' | b'\n'));
            end.map_or(rest.len(), |end| end + 2)
        } else {
            rest.iter().position(|byte| !plain(*byte)).unwrap_or(rest.len()).max(1)
        };
        found.push(&rest[..length]);
        at += length;
    }
    found
}

fn change_tokens(bytes: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let (mut ours, theirs) = (tokens(bytes), tokens(other));
    if ours.is_empty() || theirs.is_empty() {
        return bytes.to_vec();
    }
    let speaking = |token: &&&[u8]| token.iter().any(|byte| byte.is_ascii_alphanumeric());
    let places: Vec<usize> = (0..ours.len()).filter(|at| speaking(&&ours[*at])).collect();
    let at = if places.is_empty() { random.index(ours.len()) } else { places[random.index(places.len())] };
    let foreign: Vec<&[u8]> = theirs.iter().filter(speaking).copied().collect();
    let foreign =
        if foreign.is_empty() { theirs[random.index(theirs.len())] } else { foreign[random.index(foreign.len())] };
    let with = random.index(ours.len());
    match random.below(6) {
        0 => drop(ours.remove(at)),
        1 => ours.insert(with, ours[at]),
        2 => ours.swap(at, with),
        3 => ours[at] = WORDS[random.index(WORDS.len())].as_bytes(),
        // A whole member or setting again.
        4 => {
            let end = (at + 1 + random.index(8)).min(ours.len());
            let piece = ours[at..end].to_vec();
            ours.splice(end..end, piece);
        }
        _ => ours[at] = foreign,
    }
    ours.concat()
}

/// Decodes a run of base64, changes what it stands for, and encodes it again: else nearly every change ends in the
/// decoder.
fn change_base64(bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    let runs = base64_runs(&bytes);
    if runs.is_empty() {
        return change_bytes(bytes, random);
    }
    let run = runs[random.index(runs.len())].clone();
    let text: Vec<u8> = bytes[run.clone()].iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let padded = text.contains(&b'=');
    let standard = padded || text.iter().any(|byte| matches!(byte, b'+' | b'/'));
    let decoded = match (padded, standard) {
        (true, _) => STANDARD.decode(&text),
        (false, true) => STANDARD_NO_PAD.decode(&text),
        (false, false) => URL_SAFE_NO_PAD.decode(&text),
    };
    let Ok(decoded) = decoded else { return change_bytes(bytes, random) };
    let changed = match decoded.first() {
        Some(b'{') => change_tokens(&decoded, &decoded, random),
        Some(0x30) => change_der(decoded, random),
        _ => change_bytes(decoded, random),
    };
    let encoded = match (padded, standard) {
        (true, _) => STANDARD.encode(changed),
        (false, true) => STANDARD_NO_PAD.encode(changed),
        (false, false) => URL_SAFE_NO_PAD.encode(changed),
    };
    [&bytes[..run.start], encoded.as_bytes(), &bytes[run.end..]].concat()
}

/// Where base64 stands; the lines of a PEM are one run.
fn base64_runs(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let pem = bytes.starts_with(b"-----");
    let inside = |byte: u8| {
        byte.is_ascii_alphanumeric()
            || matches!(byte, b'_' | b'-' | b'+' | b'/' | b'=') && !(pem && byte == b'-')
            || pem && byte == b'\n'
    };
    let (mut runs, mut start) = (Vec::new(), None);
    for (at, byte) in bytes.iter().enumerate().map(|(at, byte)| (at, inside(*byte))).chain([(bytes.len(), false)]) {
        match (byte, start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                if at - from >= 8 {
                    runs.push(from..at);
                }
                start = None;
            }
            _ => {}
        }
    }
    runs
}

/// Changes a tag, a length or a value of one element, or leaves it out.
fn change_der(mut der: Vec<u8>, random: &mut Random) -> Vec<u8> {
    let mut elements = Vec::new();
    walk_der(&der, 0, der.len(), 0, &mut elements);
    let Some(&(at, content, end)) = elements.get(random.index(elements.len())) else {
        return change_bytes(der, random);
    };
    match random.below(6) {
        0 => der[at] = random.draw() as u8,
        1 => der[at + 1] = random.draw() as u8,
        2 => drop(der.drain(at..end)),
        3 => {
            let element = der[at..end].to_vec();
            der.splice(at..at, element);
        }
        4 => der.splice(content..content, [0]).for_each(drop),
        _ if content < end => {
            let at = content + random.index(end - content);
            der[at] = random.draw() as u8;
        }
        _ => der.truncate(content),
    }
    der
}

fn walk_der(der: &[u8], mut at: usize, end: usize, depth: usize, found: &mut Vec<(usize, usize, usize)>) {
    while depth < 8 && at + 2 <= end {
        let (content, length) = match usize::from(der[at + 1]) {
            short @ 0..=127 => (at + 2, short),
            0x81 if at + 3 <= end => (at + 3, usize::from(der[at + 2])),
            0x82 if at + 4 <= end => (at + 4, usize::from(der[at + 2]) << 8 | usize::from(der[at + 3])),
            _ => return,
        };
        let stop = content + length;
        if stop > end {
            return;
        }
        found.push((at, content, stop));
        if matches!(der[at], 0x30 | 0x31 | 0x04 | 0xa0 | 0xa1) {
            walk_der(der, content, stop, depth + 1, found);
        }
        at = stop;
    }
}

fn change_number(bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    let digits: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at].is_ascii_digit()).collect();
    if digits.is_empty() {
        return insert_word(bytes, random);
    }
    let from = digits[random.index(digits.len())];
    let end = bytes[from..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |length| from + length);
    let number = match random.below(3) {
        0 => WORDS[random.index(12)].to_owned(),
        1 => random.below(100).to_string(),
        _ => (1_u64 << random.below(64)).to_string(),
    };
    [&bytes[..from], number.as_bytes(), &bytes[end..]].concat()
}

fn insert_word(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    let (at, word) = (place(&bytes, random), WORDS[random.index(WORDS.len())]);
    bytes.splice(at..at, word.bytes());
    bytes
}

fn splice(bytes: Vec<u8>, other: &[u8], random: &mut Random) -> Vec<u8> {
    let (ours, theirs) = (range(&bytes, random), range(other, random));
    [&bytes[..ours.start], &other[theirs], &bytes[ours.end..]].concat()
}
