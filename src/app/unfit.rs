//! What a configuration's timing refuses, by whom it concerns: found once for all keysets, however many there are.

use std::collections::HashMap;

use crate::config::Loaded;
use crate::keyring::name::Name;
use crate::keyring::timing::Finding;

pub(super) struct Unfit<'a> {
    of_keyset: HashMap<&'a Name, Vec<&'a Finding>>,
    of_issuer: HashMap<&'a Name, Vec<&'a Finding>>,
    of_everything: Vec<&'a Finding>,
    issuers: HashMap<&'a Name, &'a Name>,
}

impl<'a> Unfit<'a> {
    pub(super) fn of(loaded: &'a Loaded) -> Self {
        let keysets = &loaded.config.keysets;
        let mut unfit = Unfit {
            of_keyset: HashMap::new(),
            of_issuer: HashMap::new(),
            of_everything: Vec::new(),
            issuers: keysets.iter().map(|keyset| (&keyset.name, &keyset.policy.issuer.name)).collect(),
        };
        for finding in &loaded.timing {
            match (&finding.keyset, &finding.issuer) {
                (Some(keyset), _) => unfit.of_keyset.entry(keyset).or_default().push(finding),
                (None, Some(issuer)) => unfit.of_issuer.entry(issuer).or_default().push(finding),
                (None, None) => unfit.of_everything.push(finding),
            }
        }
        unfit
    }

    /// What is about this keyset, its issuer or everything.
    pub(super) fn concerning(&self, keyset: &Name) -> impl Iterator<Item = &'a Finding> {
        let own = self.of_keyset.get(keyset);
        let issuers = self.issuers.get(keyset).and_then(|issuer| self.of_issuer.get(issuer));
        [own, issuers, Some(&self.of_everything)].into_iter().flatten().flatten().copied()
    }
}
