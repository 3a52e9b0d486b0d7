//! Which families the page has, their help texts, and which atomics their series show.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::exposition::{Exposition, Page};
use super::labels::{
    Alarm, BackendOperation, BackendOutcome, JwksCode, NoticeOutcome, RotationFailureReason, RotationStep,
    RotationTrigger, SignRejection, SigningFailure,
};
use super::{BackendSeries, IssuerSeries, KeysetSeries, Series, SigningLane, read};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::name::Name;
use crate::keyring::record::KeyState;

/// The commit that was built, where the build names one.
const REVISION: &str = match option_env!("JWKSD_REVISION") {
    Some(revision) => revision,
    None => "unknown",
};

/// Writes all families in one format at each scrape.
pub(super) struct Families {
    pub(super) series: Arc<Series>,
    pub(super) exposition: Exposition,
}

impl fmt::Debug for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Families").field("exposition", &self.exposition).finish_non_exhaustive()
    }
}

impl Collector for Families {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let page = &mut Page { encoder, exposition: self.exposition };
        let series = &*self.series;
        // Locks are held for the copies only, so that a slow scraper delays no registration.
        let keysets: Vec<Keyset> =
            read(&series.keysets).iter().map(|(name, keyset)| Keyset::of(name, &keyset.series)).collect();
        signing(page, &keysets)?;
        backends(page, series)?;
        keys(page, &keysets)?;
        rotations(page, &keysets)?;
        issuers(page, series)?;
        daemon(page, series)?;
        alarms(page, series, &keysets)?;
        process(page, series)
    }
}

/// A keyset as the page shows it.
struct Keyset {
    name: Name,
    series: Arc<KeysetSeries>,
    lanes: Vec<(&'static str, Arc<SigningLane>)>,
}

impl Keyset {
    fn of(name: &Name, series: &Arc<KeysetSeries>) -> Self {
        let lanes = read(&series.lanes).iter().map(|(backend, lane)| (*backend, lane.clone())).collect();
        Keyset { name: name.clone(), series: series.clone(), lanes }
    }
}

fn signing(page: &mut Page<'_>, keysets: &[Keyset]) -> fmt::Result {
    let lanes = || {
        keysets.iter().flat_map(|keyset| {
            let name = keyset.name.as_str();
            keyset.lanes.iter().map(move |(backend, lane)| (name, *backend, lane))
        })
    };
    page.counter("jwksd_signatures_total", "Tokens signed", |family| {
        for (keyset, backend, lane) in lanes() {
            let shown = lane.algs.load(Relaxed);
            for (i, alg) in Algorithm::ALL_ALGS.iter().enumerate().filter(|(i, _)| shown & 1 << i != 0) {
                let labels = [("keyset", keyset), ("alg", alg), ("backend", backend)];
                family.integer(&labels, lane.signatures[i].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "Signatures that the policy allows and that were not made, by what failed on our side";
    page.counter("jwksd_signing_failures_total", help, |family| {
        for (keyset, backend, lane) in lanes() {
            for reason in SigningFailure::ALL {
                let labels = [("keyset", keyset), ("backend", backend), ("reason", reason.as_str())];
                family.integer(&labels, lane.failures[reason.index()].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "Requests for a signature that were refused, by the caller's mistake";
    page.counter("jwksd_sign_rejections_total", help, |family| {
        for keyset in keysets {
            for reason in SignRejection::ALL {
                let labels = [("keyset", keyset.name.as_str()), ("reason", reason.as_str())];
                family.integer(&labels, keyset.series.rejections[reason.index()].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "Time from an accepted request for a signature to the token";
    page.histogram("jwksd_sign_duration_seconds", help, |family| {
        for (keyset, backend, lane) in lanes() {
            family.distribution(&[("keyset", keyset), ("backend", backend)], &lane.duration.observed())?;
        }
        Ok(())
    })
}

fn backends(page: &mut Page<'_>, series: &Series) -> fmt::Result {
    let backends: Vec<(&str, Arc<BackendSeries>)> =
        read(&series.backends).iter().map(|(name, backend)| (*name, backend.clone())).collect();
    page.counter("jwksd_backend_requests_total", "Requests to a backend, retries counted one by one", |family| {
        for (name, backend) in &backends {
            for operation in BackendOperation::ALL {
                for outcome in BackendOutcome::ALL {
                    let labels = [("backend", *name), ("operation", operation.as_str()), ("outcome", outcome.as_str())];
                    family.integer(&labels, backend.requests[operation.index()][outcome.index()].load(Relaxed))?;
                }
            }
        }
        Ok(())
    })?;
    page.histogram("jwksd_backend_request_duration_seconds", "Duration of one request to a backend", |family| {
        for (name, backend) in &backends {
            for operation in BackendOperation::ALL {
                let labels = [("backend", *name), ("operation", operation.as_str())];
                family.distribution(&labels, &backend.durations[operation.index()].observed())?;
            }
        }
        Ok(())
    })
}

fn keys(page: &mut Page<'_>, keysets: &[Keyset]) -> fmt::Result {
    page.gauge("jwksd_keys", "Keys by state", |family| {
        for keyset in keysets {
            for state in KeyState::ALL {
                let labels = [("keyset", keyset.name.as_str()), ("state", state.as_str())];
                family.integer(&labels, keyset.series.keys[state as usize].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "When the active key began to sign, 0 without an active key";
    per_keyset_seconds(page, "jwksd_active_key_activated_timestamp_seconds", help, keysets, |k| &k.activated_millis)?;
    let help = "When the next rotation is planned, 0 when none is";
    per_keyset_seconds(page, "jwksd_next_rotation_timestamp_seconds", help, keysets, |k| &k.next_rotation_millis)?;
    let help = "How late the rotation that is due is, 0 when none is";
    per_keyset_seconds(page, "jwksd_rotation_overdue_seconds", help, keysets, |k| &k.overdue_millis)?;
    let help = "Whether a propagated successor could be promoted now";
    per_keyset_integer(page, "jwksd_standby_ready", help, keysets, |k| &k.standby_ready)?;
    let help = "When the next successor will have propagated, 0 when none is on its way";
    per_keyset_seconds(page, "jwksd_standby_expected_timestamp_seconds", help, keysets, |k| {
        &k.standby_expected_millis
    })?;
    let help = "Whether an operator holds scheduled transitions";
    per_keyset_integer(page, "jwksd_hold", help, keysets, |k| &k.hold)?;
    let help = "Whether an operator ended the keyset";
    per_keyset_integer(page, "jwksd_drained", help, keysets, |k| &k.drained)?;
    let help = "When the keyring was last confirmed with the store, 0 before the first time";
    per_keyset_seconds(page, "jwksd_keyring_confirmed_timestamp_seconds", help, keysets, |k| &k.confirmed_millis)
}

fn rotations(page: &mut Page<'_>, keysets: &[Keyset]) -> fmt::Result {
    page.counter("jwksd_rotations_total", "Changes of the active key, by what caused them", |family| {
        for keyset in keysets {
            for trigger in RotationTrigger::ALL {
                let labels = [("keyset", keyset.name.as_str()), ("trigger", trigger.as_str())];
                family.integer(&labels, keyset.series.rotations[trigger.index()].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "Attempts at a step of a rotation that failed and will be repeated";
    page.counter("jwksd_rotation_failures_total", help, |family| {
        for keyset in keysets {
            for step in RotationStep::ALL {
                for reason in RotationFailureReason::ALL {
                    let labels =
                        [("keyset", keyset.name.as_str()), ("step", step.as_str()), ("reason", reason.as_str())];
                    let failures = &keyset.series.rotation_failures[step.index()][reason.index()];
                    family.integer(&labels, failures.load(Relaxed))?;
                }
            }
        }
        Ok(())
    })
}

fn issuers(page: &mut Page<'_>, series: &Series) -> fmt::Result {
    let issuers: Vec<(Name, Arc<IssuerSeries>)> =
        read(&series.issuers).iter().map(|(name, issuer)| (name.clone(), issuer.clone())).collect();
    page.counter("jwksd_jwks_requests_total", "Answers to requests for a JWKS, by status", |family| {
        for (name, issuer) in &issuers {
            for code in JwksCode::ALL {
                let labels = [("issuer", name.as_str()), ("code", code.as_str())];
                family.integer(&labels, issuer.requests[code.index()].load(Relaxed))?;
            }
        }
        Ok(())
    })?;
    let help = "Probes that see another JWKS than the one published, and publishers that found it changed";
    page.gauge("jwksd_publication_mismatch", help, |family| {
        issuers.iter().try_for_each(|(name, issuer)| {
            family.integer(&[("issuer", name.as_str())], issuer.publication_mismatch.load(Relaxed))
        })
    })?;
    publishers(page, &issuers)
}

fn publishers(page: &mut Page<'_>, issuers: &[(Name, Arc<IssuerSeries>)]) -> fmt::Result {
    let mut publishers = Vec::new();
    for (issuer, series) in issuers {
        let of_issuer = read(&series.publishers);
        publishers.extend(of_issuer.iter().map(|(name, publisher)| (issuer.clone(), name.clone(), publisher.clone())));
    }
    if publishers.is_empty() {
        return Ok(());
    }
    let help = "When everything an issuer publishes was last read back from a publisher";
    page.gauge("jwksd_publisher_placed_timestamp_seconds", help, |family| {
        publishers.iter().try_for_each(|(issuer, name, publisher)| {
            let labels = [("issuer", issuer.as_str()), ("publisher", name.as_str())];
            family.seconds(&labels, seconds(&publisher.placed_millis))
        })
    })?;
    let help = "Attempts to publish or read back that failed";
    page.counter("jwksd_publisher_failures_total", help, |family| {
        publishers.iter().try_for_each(|(issuer, name, publisher)| {
            let labels = [("issuer", issuer.as_str()), ("publisher", name.as_str())];
            family.integer(&labels, publisher.failures.load(Relaxed))
        })
    })
}

fn daemon(page: &mut Page<'_>, series: &Series) -> fmt::Result {
    let help =
        "How long a replica may sign without having confirmed its keyring, 0 for a store that is always confirmed";
    page.gauge("jwksd_staleness_limit_seconds", help, |family| {
        family.seconds(&[], seconds(&series.staleness_limit_millis))
    })?;
    page.counter("jwksd_admin_auth_failures_total", "Logins to the admin listener that failed", |family| {
        family.integer(&[], series.admin_auth_failures.load(Relaxed))
    })?;
    let help = "Notices that receivers took, attempts that failed, and notices that were given up";
    page.counter("jwksd_notices_total", help, |family| {
        NoticeOutcome::ALL.iter().try_for_each(|outcome| {
            family.integer(&[("outcome", outcome.as_str())], series.notices[outcome.index()].load(Relaxed))
        })
    })?;
    let help = "When the oldest notice that waits to be delivered became due, 0 when none waits";
    page.gauge("jwksd_notices_oldest_timestamp_seconds", help, |family| {
        family.seconds(&[], seconds(&series.notices_oldest_millis))
    })?;
    let help = "Whether the configuration on disk, when last read, was valid and is in force";
    page.gauge("jwksd_config_last_reload_successful", help, |family| {
        family.integer(&[], series.config_last_reload_successful.load(Relaxed))
    })?;
    let certificates = read(&series.certificates).clone();
    if !certificates.is_empty() {
        let help = "When the certificate that a listener shows expires";
        page.gauge("jwksd_certificate_expiry_timestamp_seconds", help, |family| {
            certificates.iter().try_for_each(|(listener, at)| {
                family.seconds(&[("listener", listener)], at.as_millis() as f64 / 1000.0)
            })
        })?;
    }
    let cluster_keys = *read(&series.cluster_keys);
    if let Some(at) = cluster_keys {
        let help = "When the API server last served the keys that verify service accounts, 0 before the first time";
        page.gauge("jwksd_cluster_keys_confirmed_timestamp_seconds", help, |family| {
            family.seconds(&[], at.as_millis() as f64 / 1000.0)
        })?;
    }
    page.gauge("jwksd_clock_frozen", "Whether transitions wait because the clock cannot be trusted", |family| {
        family.integer(&[], series.clock_frozen.load(Relaxed))
    })?;
    page.gauge("jwksd_build_info", "The build that runs, always 1", |family| {
        family.integer(&[("version", env!("CARGO_PKG_VERSION")), ("revision", REVISION)], 1)
    })
}

fn alarms(page: &mut Page<'_>, series: &Series, keysets: &[Keyset]) -> fmt::Result {
    let mut raised: [u64; Alarm::COUNT] = std::array::from_fn(|i| series.alarms[i].load(Relaxed));
    for keyset in keysets {
        let bits = keyset.series.alarms.load(Relaxed);
        for (i, raised) in raised.iter_mut().enumerate() {
            *raised = raised.saturating_add(u64::from(bits >> i & 1));
        }
    }
    page.gauge("jwksd_alarms", "Keysets and other things that raise the alarm now", |family| {
        Alarm::ALL.iter().try_for_each(|alarm| family.integer(&[("alarm", alarm.as_str())], raised[alarm.index()]))
    })
}

fn process(page: &mut Page<'_>, series: &Series) -> fmt::Result {
    let Some(usage) = series.process.usage() else { return Ok(()) };
    page.counter("process_cpu_seconds_total", "User and system CPU time spent", |family| {
        family.seconds(&[], usage.cpu_seconds)
    })?;
    page.gauge("process_resident_memory_bytes", "Resident memory size", |family| {
        family.integer(&[], usage.resident_memory_bytes)
    })?;
    page.gauge("process_virtual_memory_bytes", "Virtual memory size", |family| {
        family.integer(&[], usage.virtual_memory_bytes)
    })?;
    if let Some(open_fds) = usage.open_fds {
        page.gauge("process_open_fds", "Open file descriptors", |family| family.integer(&[], open_fds))?;
    }
    page.gauge("process_max_fds", "The limit of open file descriptors", |family| match usage.max_fds {
        Some(limit) => family.integer(&[], limit),
        None => family.seconds(&[], f64::INFINITY),
    })?;
    if let Some(start) = usage.start_time_seconds {
        let help = "When the process started, in seconds since 1970";
        page.gauge("process_start_time_seconds", help, |family| family.seconds(&[], start))?;
    }
    Ok(())
}

fn per_keyset_integer(
    page: &mut Page<'_>,
    name: &'static str,
    help: &str,
    keysets: &[Keyset],
    value: impl Fn(&KeysetSeries) -> &AtomicU64,
) -> fmt::Result {
    page.gauge(name, help, |family| {
        keysets.iter().try_for_each(|keyset| {
            family.integer(&[("keyset", keyset.name.as_str())], value(&keyset.series).load(Relaxed))
        })
    })
}

fn per_keyset_seconds(
    page: &mut Page<'_>,
    name: &'static str,
    help: &str,
    keysets: &[Keyset],
    millis: impl Fn(&KeysetSeries) -> &AtomicU64,
) -> fmt::Result {
    page.gauge(name, help, |family| {
        keysets
            .iter()
            .try_for_each(|keyset| family.seconds(&[("keyset", keyset.name.as_str())], seconds(millis(&keyset.series))))
    })
}

fn seconds(millis: &AtomicU64) -> f64 {
    millis.load(Relaxed) as f64 / 1000.0
}
