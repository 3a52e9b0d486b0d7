//! Conditional requests (RFC 9110 §13).

use http::HeaderValue;

/// What an `If-Match` field demands.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Demand {
    /// `*`: that there is something.
    Anything,
    /// That it has one of these strong tags, which stand here without their quotes. A weak tag matches nothing (RFC 9110
    /// §13.1.1), so none stands here, and where all are weak the list is empty.
    OneOf(Vec<String>),
}

/// Reads the lines of an `If-Match` field; `None` where they are not what RFC 9110 §13.1.1 allows.
pub(super) fn demand<'a>(lines: impl Iterator<Item = &'a HeaderValue>) -> Option<Demand> {
    let lines: Vec<&str> = lines.map(|line| line.to_str().ok()).collect::<Option<_>>()?;
    // Several lines are one list (RFC 9110 §5.3).
    let text = lines.join(",");
    if text.trim() == "*" {
        return Some(Demand::Anything);
    }
    let (mut rest, mut tags, mut found) = (text.as_str(), Vec::new(), false);
    loop {
        // Empty elements of a list are ignored (RFC 9110 §5.6.1.2).
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return found.then_some(Demand::OneOf(tags));
        }
        let (weak, quoted) = rest.strip_prefix("W/").map_or((false, rest), |quoted| (true, quoted));
        let (tag, after) = quoted.strip_prefix('"')?.split_once('"')?;
        if !tag.bytes().all(|byte| matches!(byte, 0x21..=0x7e)) {
            return None;
        }
        found = true;
        if !weak {
            tags.push(tag.to_owned());
        }
        rest = after.trim_start_matches([' ', '\t']);
        if !rest.is_empty() && !rest.starts_with(',') {
            return None;
        }
    }
}

/// Whether an `If-None-Match` value names the tag; the comparison is weak (RFC 9110 §13.1.2).
pub(super) fn names(value: &HeaderValue, etag: &HeaderValue) -> bool {
    let (Ok(value), Ok(etag)) = (value.to_str(), etag.to_str()) else { return false };
    value.trim() == "*" || value.split(',').any(|tag| tag.trim().trim_start_matches("W/") == etag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_demands_anything_or_one_of_its_strong_tags() {
        let read = |lines: &[&'static str]| {
            let lines: Vec<HeaderValue> = lines.iter().map(|line| HeaderValue::from_static(line)).collect();
            demand(lines.iter())
        };
        let one_of = |tags: &[&str]| Some(Demand::OneOf(tags.iter().map(|tag| (*tag).to_owned()).collect()));
        assert_eq!(read(&["*"]), Some(Demand::Anything));
        assert_eq!(read(&[" \"44\" "]), one_of(&["44"]));
        assert_eq!(read(&["\"a,b\" ,, W/\"44\",\"\""]), one_of(&["a,b", ""]));
        assert_eq!(read(&["\"43\"", "\"44\""]), one_of(&["43", "44"]));
        assert_eq!(read(&["W/\"44\""]), one_of(&[]), "a weak tag matches nothing");
        for wrong in
            ["", ",", "44", "\"44", "w/\"44\"", "W/ \"44\"", "\"4 4\"", "\"43\" \"44\"", "*, \"44\"", "\"44\"x"]
        {
            assert_eq!(read(&[wrong]), None, "{wrong}");
        }
    }
}
