//! Splits JSON (RFC 8259) into its texts without changing them, so that numbers reach the token digit by digit and
//! strings byte by byte.
//!
//! serde_json judges the grammar, once ([`Json::parse`]); what follows relies on it and only looks for the ends of
//! values. It is total all the same: on a text that is not JSON it would stop early, never panic or loop.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// The text of one well-formed JSON value, without white space around it.
#[derive(Clone, Copy)]
pub(super) struct Json<'a>(&'a str);

/// What a JSON value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Null,
    Bool,
    Number,
    String,
    Array,
    Object,
}

impl<'a> Json<'a> {
    /// The one value that `text` is; anything before or after it but white space is an error, as is text that is not
    /// UTF-8. Nesting is not limited here, and costs no stack.
    pub(super) fn parse(text: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice::<&RawValue>(text).map(|raw| Json(raw.get()))
    }

    pub(super) fn kind(self) -> Kind {
        match self.0.as_bytes().first() {
            Some(b'{') => Kind::Object,
            Some(b'[') => Kind::Array,
            Some(b'"') => Kind::String,
            Some(b't' | b'f') => Kind::Bool,
            Some(b'-' | b'0'..=b'9') => Kind::Number,
            _ => Kind::Null,
        }
    }

    /// As it was written.
    pub(super) fn text(self) -> &'a str {
        self.0
    }

    /// What a string says; `None` for other values, and for a string with half a surrogate pair (`"\ud800"`), which
    /// the grammar allows but no Unicode text can hold.
    pub(super) fn string(self) -> Option<Cow<'a, str>> {
        if self.kind() != Kind::String {
            return None;
        }
        if self.0.contains('\\') {
            return serde_json::from_str(self.0).ok().map(Cow::Owned);
        }
        self.0.get(1..self.0.len().saturating_sub(1)).map(Cow::Borrowed)
    }

    /// A number without sign, fraction or exponent; larger ones than `i64::MAX` become it.
    pub(super) fn whole_number(self) -> Option<i64> {
        let digits = !self.0.is_empty() && self.0.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| self.0.parse().unwrap_or(i64::MAX))
    }

    pub(super) fn walk(self) -> Cursor<'a> {
        Cursor { text: self.0, at: 0 }
    }
}

/// A place in a well-formed text.
pub(super) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// What the value that starts here is.
    pub(super) fn kind(&self) -> Kind {
        Json(self.text.get(self.at..).unwrap_or_default()).kind()
    }

    /// Steps into an array or object.
    pub(super) fn enter(&mut self) {
        self.at += 1;
    }

    /// Steps to the next element or member; `false`, and behind the bracket, when there is none.
    pub(super) fn next_item(&mut self) -> bool {
        self.skip_space();
        if self.peek() == Some(b',') {
            self.at += 1;
            self.skip_space();
        }
        match self.peek() {
            Some(b']' | b'}') => {
                self.at += 1;
                false
            }
            Some(_) => true,
            None => false,
        }
    }

    /// The name of the member that starts here; leaves the cursor at its value.
    pub(super) fn name(&mut self) -> Json<'a> {
        let name = self.leaf();
        self.skip_space();
        self.at += 1;
        self.skip_space();
        name
    }

    /// The string, number or literal that starts here; leaves the cursor behind it.
    pub(super) fn leaf(&mut self) -> Json<'a> {
        let start = self.at;
        if self.peek() == Some(b'"') {
            self.skip_string();
        } else {
            self.at += 1;
            self.find(|byte| matches!(byte, b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t'));
        }
        self.since(start)
    }

    /// Whatever value starts here, unread; leaves the cursor behind it.
    pub(super) fn value(&mut self) -> Json<'a> {
        if !matches!(self.kind(), Kind::Array | Kind::Object) {
            return self.leaf();
        }
        let (start, mut open) = (self.at, 0_usize);
        while let Some(found) = self.find(|byte| matches!(byte, b'"' | b'{' | b'[' | b'}' | b']')) {
            match found {
                b'"' => {
                    self.skip_string();
                    continue;
                }
                b'{' | b'[' => open += 1,
                _ => open = open.saturating_sub(1),
            }
            self.at += 1;
            if open == 0 {
                break;
            }
        }
        self.since(start)
    }

    /// Where the cursor is, for [`since`](Self::since).
    pub(super) fn mark(&self) -> usize {
        self.at
    }

    /// The value that started at the mark and ended here.
    pub(super) fn since(&self, mark: usize) -> Json<'a> {
        Json(self.text.get(mark..self.at).unwrap_or_default())
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        if self.peek().is_some_and(|byte| byte <= b' ') {
            self.find(|byte| byte > b' ');
        }
    }

    fn skip_string(&mut self) {
        self.at += 1;
        while let Some(found) = self.find(|byte| matches!(byte, b'"' | b'\\')) {
            self.at += if found == b'\\' { 2 } else { 1 };
            if found == b'"' {
                return;
            }
        }
    }

    /// Goes on to the next byte like that, or to the end.
    fn find(&mut self, like: impl Fn(u8) -> bool) -> Option<u8> {
        let rest = self.text.as_bytes().get(self.at..).unwrap_or_default();
        let found = rest.iter().position(|byte| like(*byte));
        self.at += found.unwrap_or(rest.len());
        found.and_then(|at| rest.get(at)).copied()
    }
}
