//! Whether somebody else changed what is at a path: what is found, held against what this process left there.

use std::sync::Arc;

use super::pass::{Rendering, generations_of};
use crate::engine::cell::RouteKind;
use crate::keyring::placement::{Generations, Reason, Standing, Writer};
use crate::keyring::publication::{Discrepancy, Served};
use crate::keyring::record::Keyring;
use crate::keyring::time::Timestamp;
use crate::publisher::{Outgoing, Placed};

/// The last document of ours at a path.
#[derive(Clone)]
pub(super) struct Left {
    pub generations: Generations,
    pub document: Outgoing,
    /// It was read back, and this process has not tried to replace it since: a write that failed may have been carried
    /// out nevertheless.
    pub surely: bool,
}

impl Left {
    fn is(&self, found: &Placed) -> bool {
        found.is(&self.document) && found.generations.as_ref() == Some(&self.document.generations)
    }
}

impl Rendering {
    /// Whether no writer of ours has left it so, as far as can be known.
    pub(super) fn is_foreign(
        &self,
        reason: &Reason,
        kind: RouteKind,
        found: Option<&Placed>,
        left: Option<&Left>,
        now: Timestamp,
    ) -> bool {
        let Some(found) = found else { return left.is_some() };
        if left.is_some_and(|left| left.is(found)) {
            return false; // It is the daemon that went on.
        }
        match reason {
            Reason::Older | Reason::Altered => {
                let altered = *reason == Reason::Altered;
                let nobody_else = self.writer == Writer::Sole && left.is_some_and(|left| left.surely);
                nobody_else
                    || left.is_some_and(|left| self.is_before(found, left))
                    || match kind {
                        RouteKind::Jwks => self.is_inexplicable(found, altered, left.is_some(), now),
                        RouteKind::Discovery => altered && left.is_some(),
                    }
            }
            reason => reason.is_foreign(self.writer),
        }
    }

    /// Whether what is found is older than what was there: no writer of ours takes a step back.
    fn is_before(&self, found: &Placed, left: &Left) -> bool {
        generations_of(found)
            .is_some_and(|placed| placed.compare(&left.generations, &self.known(&placed)) == Standing::Older)
    }

    /// Whether a key set has or lacks what no rendering of ours would. A crash between two files, another order in the
    /// configuration or another release leave one that is `altered`; what is older may lack keys and show ended ones, and
    /// after a long absence (it is not `recent`) even some that the record knows no more.
    fn is_inexplicable(&self, found: &Placed, altered: bool, recent: bool, now: Timestamp) -> bool {
        let Some(keyring) = self.keyrings.first() else { return true };
        let keyrings: Vec<&Keyring> = self.keyrings.iter().map(Arc::as_ref).collect();
        let discrepancies = Served::parse(&found.body).discrepancies(&keyrings, &keyring.policy.issuer, now);
        discrepancies.iter().any(|discrepancy| match discrepancy {
            Discrepancy::Missing { .. } | Discrepancy::Ended { .. } => altered,
            Discrepancy::Foreign { .. } => altered || recent,
            Discrepancy::Unreadable | Discrepancy::Tampered { .. } | Discrepancy::Repeated { .. } => true,
        })
    }
}
