//! Which of two copies of an issuer's documents is the newer one, and what a writer does about the copy it finds.
//!
//! Several replicas may write to one place, and one of them may lag. What is placed therefore says from which
//! generation of each keyset it was rendered, and an older document never replaces a newer one.

use std::collections::BTreeMap;
use std::fmt;

use super::name::Name;
use super::record::Keyring;

/// The most bytes of the text form. S3 takes 2 KB of user metadata, names included.
pub const GENERATIONS_BYTES_MAX: usize = 1_900;

/// Characters of a lineage in the text form: 48 bits tell those of one keyset apart.
const LINEAGE_CHARS: usize = 12;

/// Where one keyset stood.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Position {
    lineage: String,
    generation: u64,
}

/// Where each keyset of an issuer stood when its documents were rendered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generations(BTreeMap<Name, Position>);

impl Generations {
    /// Of these keyrings. Keysets that ended are left out where there are too many for the text form: what they last
    /// published has expired.
    pub fn of<'a>(keyrings: impl IntoIterator<Item = &'a Keyring>) -> Self {
        let (mut all, mut ended) = (Vec::new(), Vec::new());
        for keyring in keyrings {
            if keyring.drained && keyring.published().next().is_none() {
                ended.push(keyring.keyset.clone());
            }
            all.push(keyring);
        }
        let mut generations = Generations::exactly(all);
        for keyset in ended {
            if generations.to_string().len() <= GENERATIONS_BYTES_MAX {
                break;
            }
            generations.0.remove(&keyset);
        }
        generations
    }

    /// Of these keyrings, however many. Not for the text form.
    pub fn exactly<'a>(keyrings: impl IntoIterator<Item = &'a Keyring>) -> Self {
        let position = |keyring: &Keyring| Position {
            lineage: keyring.lineage.chars().filter(char::is_ascii_alphanumeric).take(LINEAGE_CHARS).collect(),
            generation: keyring.generation,
        };
        Generations(keyrings.into_iter().map(|keyring| (keyring.keyset.clone(), position(keyring))).collect())
    }

    pub fn keysets(&self) -> impl Iterator<Item = &Name> {
        self.0.keys()
    }

    /// The inverse of `Display`; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > GENERATIONS_BYTES_MAX {
            return None;
        }
        let mut positions = BTreeMap::new();
        for entry in text.split(' ') {
            let [keyset, lineage, generation] = entry.split(':').collect::<Vec<_>>()[..] else { return None };
            let generation = generation.parse().ok()?;
            let former =
                positions.insert(Name::parse(keyset).ok()?, Position { lineage: lineage.to_owned(), generation });
            if former.is_some() {
                return None;
            }
        }
        Some(Generations(positions))
    }

    /// How a copy that was rendered from these compares with what this process would place. `known` are those
    /// of its keysets that this process knows, whatever their issuer now: one that left did so in a later generation.
    pub fn compare(&self, ours: &Generations, known: &Generations) -> Standing {
        let (mut ahead, mut behind) = (None, None);
        for (keyset, placed) in &self.0 {
            let position = ours.0.get(keyset).or_else(|| known.0.get(keyset));
            match position {
                Some(position) if position.lineage != placed.lineage => {
                    return Standing::OtherLineage { keyset: keyset.clone() };
                }
                Some(position) if position.generation < placed.generation => ahead = Some(keyset),
                Some(position) if position.generation > placed.generation => behind = Some(keyset),
                // The same record, and yet it is of this issuer there and not here.
                Some(_) if !ours.0.contains_key(keyset) => behind = Some(keyset),
                Some(_) => {}
                // Whoever placed it knows a keyset that we do not.
                None => ahead = Some(keyset),
            }
        }
        behind = behind.or_else(|| ours.0.keys().find(|keyset| !self.0.contains_key(*keyset)));
        match (ahead.cloned(), behind.cloned()) {
            (None, None) => Standing::Same,
            (None, Some(_)) => Standing::Older,
            (Some(keyset), None) => Standing::Newer { keyset },
            (Some(ahead), Some(behind)) => Standing::Diverged { ahead, behind },
        }
    }
}

/// `NAME:LINEAGE:GENERATION` of each keyset, separated by spaces: fit for an HTTP header.
impl fmt::Display for Generations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (keyset, position)) in self.0.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{keyset}:{}:{}", position.lineage, position.generation)?;
        }
        Ok(())
    }
}

/// How a placed copy compares with ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    Same,
    /// No keyset of it is ahead of ours, and one is behind.
    Older,
    /// No keyset of it is behind ours, and this one is ahead.
    Newer {
        keyset: Name,
    },
    /// Each has something that the other has not yet.
    Diverged {
        ahead: Name,
        behind: Name,
    },
    /// A keyset began anew, here or there: its generations say nothing of each other.
    OtherLineage {
        keyset: Name,
    },
}

/// What is found at a place.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    Nothing,
    /// A document without a legible mark.
    Unmarked,
    Marked {
        generations: &'a Generations,
        /// It is, byte for byte, what we would place.
        same: bool,
    },
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    /// The only process that uses its store: nobody can be ahead of it.
    Sole,
    /// One of several replicas.
    Replica,
    /// One whose record of a keyset cannot be trusted any more, or was not confirmed for long: it may well be the one that
    /// is wrong.
    Doubtful,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is ours.
    Current,
    Write(Reason),
    /// Somebody else's copy stays, until we know more.
    Leave(Reason),
}

/// What was found instead of our copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    Nothing,
    Unmarked,
    Altered,
    Older,
    Newer { keyset: Name },
    Diverged { ahead: Name, behind: Name },
    OtherLineage { keyset: Name },
}

impl Reason {
    /// Whether no writer of this installation that works as it should has left it so.
    pub fn is_foreign(&self, writer: Writer) -> bool {
        match self {
            Reason::Nothing | Reason::Older => false,
            Reason::Unmarked | Reason::Altered | Reason::OtherLineage { .. } => true,
            Reason::Newer { .. } | Reason::Diverged { .. } => writer == Writer::Sole,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Nothing => f.write_str("nothing is there"),
            Reason::Unmarked => f.write_str("what is there does not say from which generations it was rendered"),
            Reason::Altered => f.write_str("what is there says that it is ours, and is something else"),
            Reason::Older => f.write_str("what is there is older"),
            Reason::Newer { keyset } => write!(f, "what is there has a later generation of keyset {keyset}"),
            Reason::Diverged { ahead, behind } => {
                write!(f, "what is there has a later generation of keyset {ahead} and an earlier one of {behind}")
            }
            Reason::OtherLineage { keyset } => {
                write!(
                    f,
                    "what is there comes from another life of keyset {keyset}: another installation's, or from before a recovery"
                )
            }
        }
    }
}

/// Decides what a writer does about what it finds.
pub fn verdict(found: Found<'_>, ours: &Generations, known: &Generations, writer: Writer) -> Verdict {
    let (generations, same) = match found {
        Found::Nothing => return Verdict::Write(Reason::Nothing),
        Found::Unmarked => return Verdict::Write(Reason::Unmarked),
        Found::Marked { generations, same } => (generations, same),
    };
    let unless = |trusted: bool, reason| if trusted { Verdict::Write(reason) } else { Verdict::Leave(reason) };
    match generations.compare(ours, known) {
        Standing::Same if same => Verdict::Current,
        Standing::Same => Verdict::Write(Reason::Altered),
        Standing::Older => Verdict::Write(Reason::Older),
        Standing::Newer { keyset } => unless(writer == Writer::Sole, Reason::Newer { keyset }),
        Standing::Diverged { ahead, behind } => unless(writer == Writer::Sole, Reason::Diverged { ahead, behind }),
        Standing::OtherLineage { keyset } => unless(writer != Writer::Doubtful, Reason::OtherLineage { keyset }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generations(text: &str) -> Generations {
        if text.is_empty() { Generations::default() } else { Generations::parse(text).unwrap() }
    }

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn compare(placed: &str, ours: &str, elsewhere: &str) -> Standing {
        let known = format!("{ours} {elsewhere}");
        generations(placed).compare(&generations(ours), &generations(known.trim()))
    }

    #[test]
    fn the_text_form_is_read_back_and_nothing_else_is() {
        for text in ["a:0f:1", "a:0f:1 b:ab:18446744073709551615"] {
            assert_eq!(Generations::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "a", "a:0f", "a:0f:x", "a:0f:-1", "A:0f:1", "a:0f:1 ", " a:0f:1", "a:0f:1 a:0f:2", "a:0f:1:2"]
        {
            assert_eq!(Generations::parse(text), None, "{text:?}");
        }
        assert_eq!(Generations::parse(&"a:0f:1 ".repeat(400)), None);
    }

    #[test]
    fn a_copy_is_compared_keyset_by_keyset() {
        let newer = |keyset: &str| Standing::Newer { keyset: name(keyset) };
        let diverged = |ahead: &str, behind: &str| Standing::Diverged { ahead: name(ahead), behind: name(behind) };
        for (placed, ours, standing) in [
            ("a:x:5", "a:x:5", Standing::Same),
            ("a:x:4", "a:x:5", Standing::Older),
            ("a:x:6", "a:x:5", newer("a")),
            ("a:x:5 b:y:2", "a:x:5 b:y:2", Standing::Same),
            ("a:x:5 b:y:2", "a:x:5 b:y:3", Standing::Older),
            ("a:x:5 b:y:3", "a:x:5 b:y:2", newer("b")),
            ("a:x:6 b:y:1", "a:x:5 b:y:2", diverged("a", "b")),
            ("a:x:4 b:y:3", "a:x:5 b:y:2", diverged("b", "a")),
            ("a:z:9", "a:x:5", Standing::OtherLineage { keyset: name("a") }),
            ("a:x:9 b:z:1", "a:x:5 b:y:2", Standing::OtherLineage { keyset: name("b") }),
        ] {
            assert_eq!(compare(placed, ours, ""), standing, "{placed} against {ours}");
        }
    }

    #[test]
    fn keysets_that_came_or_went_decide_too() {
        // A keyset that we have and the copy has not was added since.
        assert_eq!(compare("a:x:5", "a:x:5 b:y:1", ""), Standing::Older);
        assert_eq!(compare("a:x:6", "a:x:5 b:y:1", ""), Standing::Diverged { ahead: name("a"), behind: name("b") });
        // One that the copy has and nobody here knows was added by somebody who is ahead.
        assert_eq!(compare("a:x:5 b:y:1", "a:x:5", ""), Standing::Newer { keyset: name("b") });
        assert_eq!(compare("b:y:1", "a:x:1", ""), Standing::Diverged { ahead: name("b"), behind: name("a") });
        // One that is known here as another issuer's, or as ended, left this issuer since.
        assert_eq!(compare("a:x:5 b:y:1", "a:x:5", "b:y:2"), Standing::Older);
        assert_eq!(compare("a:x:5 b:y:2", "a:x:5", "b:y:2"), Standing::Older);
        assert_eq!(compare("a:x:5 b:y:3", "a:x:5", "b:y:2"), Standing::Newer { keyset: name("b") });
        assert_eq!(compare("a:x:5 b:z:3", "a:x:5", "b:y:2"), Standing::OtherLineage { keyset: name("b") });
    }

    fn decide(placed: &str, same: bool, writer: Writer) -> Verdict {
        let (generations, ours) = (generations(placed), generations("a:x:5 b:y:2"));
        verdict(Found::Marked { generations: &generations, same }, &ours, &ours, writer)
    }

    #[test]
    fn an_older_copy_is_replaced_and_a_newer_one_is_not() {
        for writer in [Writer::Sole, Writer::Replica, Writer::Doubtful] {
            assert_eq!(decide("a:x:5 b:y:2", true, writer), Verdict::Current);
            assert_eq!(decide("a:x:5 b:y:2", false, writer), Verdict::Write(Reason::Altered));
            assert_eq!(decide("a:x:4 b:y:2", false, writer), Verdict::Write(Reason::Older));
            // The same bytes from an older generation: the mark has to move on, or a laggard could take over.
            assert_eq!(decide("a:x:4 b:y:2", true, writer), Verdict::Write(Reason::Older));
            let ours = generations("a:x:5");
            assert_eq!(verdict(Found::Nothing, &ours, &ours, writer), Verdict::Write(Reason::Nothing));
            assert_eq!(verdict(Found::Unmarked, &ours, &ours, writer), Verdict::Write(Reason::Unmarked));
        }
        let newer = Reason::Newer { keyset: name("a") };
        let diverged = Reason::Diverged { ahead: name("a"), behind: name("b") };
        for writer in [Writer::Replica, Writer::Doubtful] {
            assert_eq!(decide("a:x:6 b:y:2", false, writer), Verdict::Leave(newer.clone()));
            assert_eq!(decide("a:x:6 b:y:1", false, writer), Verdict::Leave(diverged.clone()));
        }
        // Nobody can be ahead of the only writer.
        assert_eq!(decide("a:x:6 b:y:2", false, Writer::Sole), Verdict::Write(newer));
        assert_eq!(decide("a:x:6 b:y:1", false, Writer::Sole), Verdict::Write(diverged));
    }

    #[test]
    fn another_lineage_is_replaced_by_whoever_trusts_its_own_records() {
        let reason = Reason::OtherLineage { keyset: name("a") };
        for (writer, wanted) in [
            (Writer::Sole, Verdict::Write(reason.clone())),
            (Writer::Replica, Verdict::Write(reason.clone())),
            (Writer::Doubtful, Verdict::Leave(reason.clone())),
        ] {
            assert_eq!(decide("a:z:1 b:y:2", false, writer), wanted);
        }
    }

    #[test]
    fn what_a_writer_of_ours_leaves_behind_is_not_foreign() {
        let newer = Reason::Newer { keyset: name("a") };
        let other = Reason::OtherLineage { keyset: name("a") };
        for (reason, sole, replica) in [
            (Reason::Nothing, false, false),
            (Reason::Older, false, false),
            (Reason::Unmarked, true, true),
            (Reason::Altered, true, true),
            (other, true, true),
            (newer, true, false),
        ] {
            assert_eq!(
                (reason.is_foreign(Writer::Sole), reason.is_foreign(Writer::Replica)),
                (sole, replica),
                "{reason}"
            );
        }
    }
}
