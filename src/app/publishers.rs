//! The places where issuers are published besides the public listener.

use std::sync::Arc;

use crate::clock::SystemClock;
use crate::config::{Config, Publisher as Configured, PublisherKind};
use crate::engine::placing::Place;
use crate::publisher::Publisher;
use crate::publisher::file::FilePublisher;
use crate::publisher::s3::{Bucket, S3Publisher};

/// The places that the configuration names. Nothing is opened or sent yet.
pub(super) fn places(config: &Config) -> Vec<Place> {
    let place = |configured: &Configured| {
        // An issuer without keysets has no documents.
        let mut issuers = config.keysets.iter().map(|keyset| &keyset.policy.issuer);
        let issuer = issuers.find(|issuer| issuer.name == configured.issuer)?;
        Some(Place::new(issuer.url.clone(), configured.name.clone(), publisher(&configured.kind)))
    };
    config.publishers.iter().filter_map(place).collect()
}

fn publisher(kind: &PublisherKind) -> Arc<dyn Publisher> {
    match kind {
        PublisherKind::File { path } => Arc::new(FilePublisher::new(path.clone())),
        PublisherKind::S3 { bucket, prefix, region, endpoint_url } => {
            let bucket = Bucket {
                name: bucket.clone(),
                prefix: prefix.clone(),
                region: region.clone(),
                endpoint_url: endpoint_url.clone(),
            };
            Arc::new(S3Publisher::new(bucket, Arc::new(SystemClock)))
        }
    }
}
