use super::*;
use crate::keyring::algorithm::RsaBits;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn text(metrics: &Metrics) -> String {
    metrics.render(None).1
}

/// The value of the series whose line starts with `series`.
fn value(metrics: &Metrics, series: &str) -> Option<f64> {
    let page = text(metrics);
    let line = page.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')))?;
    Some(line[series.len() + 1..].parse().unwrap())
}

#[test]
fn every_series_of_a_keyset_exists_from_the_start_with_0() {
    let metrics = Metrics::new();
    metrics.register_keyset(&name("default"), Algorithm::Es256, "local", &name("main"));
    let mut expected = vec![
        r#"jwksd_signatures_total{keyset="default",alg="ES256",backend="local"}"#.to_owned(),
        r#"jwksd_sign_duration_seconds_count{keyset="default",backend="local"}"#.to_owned(),
        r#"jwksd_publication_mismatch{issuer="main"}"#.to_owned(),
    ];
    for gauge in [
        "active_key_activated_timestamp_seconds",
        "next_rotation_timestamp_seconds",
        "rotation_overdue_seconds",
        "standby_ready",
        "standby_expected_timestamp_seconds",
        "hold",
        "keyring_confirmed_timestamp_seconds",
    ] {
        expected.push(format!(r#"jwksd_{gauge}{{keyset="default"}}"#));
    }
    for reason in SigningFailure::ALL {
        let labels = format!(r#"keyset="default",backend="local",reason="{reason}""#);
        expected.push(format!("jwksd_signing_failures_total{{{labels}}}"));
    }
    for reason in SignRejection::ALL {
        expected.push(format!(r#"jwksd_sign_rejections_total{{keyset="default",reason="{reason}"}}"#));
    }
    for state in KeyState::ALL {
        expected.push(format!(r#"jwksd_keys{{keyset="default",state="{state}"}}"#));
    }
    for trigger in RotationTrigger::ALL {
        expected.push(format!(r#"jwksd_rotations_total{{keyset="default",trigger="{trigger}"}}"#));
    }
    for step in RotationStep::ALL {
        for reason in RotationFailureReason::ALL {
            let labels = format!(r#"keyset="default",step="{step}",reason="{reason}""#);
            expected.push(format!("jwksd_rotation_failures_total{{{labels}}}"));
        }
    }
    for operation in BackendOperation::ALL {
        let labels = format!(r#"backend="local",operation="{operation}""#);
        expected.push(format!("jwksd_backend_request_duration_seconds_count{{{labels}}}"));
        for outcome in BackendOutcome::ALL {
            expected.push(format!(r#"jwksd_backend_requests_total{{{labels},outcome="{outcome}"}}"#));
        }
    }
    for code in JwksCode::ALL {
        expected.push(format!(r#"jwksd_jwks_requests_total{{issuer="main",code="{}"}}"#, code.as_str()));
    }
    for alarm in Alarm::ALL {
        expected.push(format!(r#"jwksd_alarms{{alarm="{alarm}"}}"#));
    }
    for plain in [
        "jwksd_staleness_limit_seconds",
        "jwksd_admin_auth_failures_total",
        "jwksd_config_last_reload_successful",
        "jwksd_clock_frozen",
    ] {
        expected.push(plain.to_owned());
    }
    for series in expected {
        assert_eq!(value(&metrics, &series), Some(0.0), "{series}");
    }
}

#[test]
fn every_handle_moves_its_own_series() {
    let metrics = Metrics::new();
    let keyset = metrics.register_keyset(&name("default"), Algorithm::Es256, "local", &name("main"));
    let issuer = metrics.register_issuer(&name("main"));
    let backend = metrics.register_backend("local");
    let signing = keyset.signing(Algorithm::Es256, "local");
    let at = |millis: i64| Timestamp::from_millis(1_795_514_400_000 + millis);

    signing.signed(Duration::from_micros(20));
    signing.signed(Duration::from_secs(20));
    signing.failed(SigningFailure::Overload);
    signing.rejected(SignRejection::Ttl);
    keyset.rejected(SignRejection::Malformed);
    keyset.set_keys(KeyState::Retiring, 3);
    keyset.set_active_key_activated(Some(at(0)));
    keyset.set_next_rotation(Some(at(250)));
    keyset.set_rotation_overdue(Span::from_millis(1500));
    keyset.rotated(RotationTrigger::Rollback);
    keyset.rotation_failed(RotationStep::Create, RotationFailureReason::Room);
    keyset.set_standby_ready(true);
    keyset.set_standby_expected(Some(at(1000)));
    keyset.set_hold(true);
    keyset.set_drained(true);
    keyset.set_confirmed(at(2000));
    issuer.jwks_requested(JwksCode::from_status(304));
    issuer.set_publication_mismatch(2);
    backend.requested(BackendOperation::Sign, BackendOutcome::Throttled, Duration::from_millis(3));
    metrics.set_staleness_limit(Span::HOUR);
    metrics.admin_auth_failed();
    metrics.set_config_last_reload_successful(true);
    metrics.set_clock_frozen(true);

    for (series, expected) in [
        (r#"jwksd_signatures_total{keyset="default",alg="ES256",backend="local"}"#, 2.0),
        (r#"jwksd_sign_duration_seconds_count{keyset="default",backend="local"}"#, 2.0),
        (r#"jwksd_sign_duration_seconds_sum{keyset="default",backend="local"}"#, 20.00002),
        (r#"jwksd_sign_duration_seconds_bucket{le="10.0",keyset="default",backend="local"}"#, 1.0),
        (r#"jwksd_sign_duration_seconds_bucket{le="+Inf",keyset="default",backend="local"}"#, 2.0),
        (r#"jwksd_signing_failures_total{keyset="default",backend="local",reason="overload"}"#, 1.0),
        (r#"jwksd_signing_failures_total{keyset="default",backend="local",reason="no_active_key"}"#, 0.0),
        (r#"jwksd_sign_rejections_total{keyset="default",reason="ttl"}"#, 1.0),
        (r#"jwksd_sign_rejections_total{keyset="default",reason="malformed"}"#, 1.0),
        (r#"jwksd_keys{keyset="default",state="retiring"}"#, 3.0),
        (r#"jwksd_active_key_activated_timestamp_seconds{keyset="default"}"#, 1_795_514_400.0),
        (r#"jwksd_next_rotation_timestamp_seconds{keyset="default"}"#, 1_795_514_400.25),
        (r#"jwksd_rotation_overdue_seconds{keyset="default"}"#, 1.5),
        (r#"jwksd_rotations_total{keyset="default",trigger="rollback"}"#, 1.0),
        (r#"jwksd_rotation_failures_total{keyset="default",step="create",reason="room"}"#, 1.0),
        (r#"jwksd_rotation_failures_total{keyset="default",step="publish",reason="room"}"#, 0.0),
        (r#"jwksd_standby_ready{keyset="default"}"#, 1.0),
        (r#"jwksd_standby_expected_timestamp_seconds{keyset="default"}"#, 1_795_514_401.0),
        (r#"jwksd_hold{keyset="default"}"#, 1.0),
        (r#"jwksd_drained{keyset="default"}"#, 1.0),
        (r#"jwksd_keyring_confirmed_timestamp_seconds{keyset="default"}"#, 1_795_514_402.0),
        (r#"jwksd_jwks_requests_total{issuer="main",code="304"}"#, 1.0),
        (r#"jwksd_publication_mismatch{issuer="main"}"#, 2.0),
        (r#"jwksd_backend_requests_total{backend="local",operation="sign",outcome="throttled"}"#, 1.0),
        (r#"jwksd_backend_request_duration_seconds_sum{backend="local",operation="sign"}"#, 0.003),
        ("jwksd_staleness_limit_seconds", 3600.0),
        ("jwksd_admin_auth_failures_total", 1.0),
        ("jwksd_config_last_reload_successful", 1.0),
        ("jwksd_clock_frozen", 1.0),
    ] {
        assert_eq!(value(&metrics, series), Some(expected), "{series}");
    }
    keyset.set_next_rotation(None);
    assert_eq!(value(&metrics, r#"jwksd_next_rotation_timestamp_seconds{keyset="default"}"#), Some(0.0));
}

#[test]
fn an_alarm_counts_the_keysets_and_things_that_raise_it() {
    let metrics = Metrics::new();
    let a = metrics.register_keyset(&name("a"), Algorithm::Es256, "local", &name("main"));
    let b = metrics.register_keyset(&name("b"), Algorithm::Es256, "local", &name("main"));
    let no_standby = || value(&metrics, r#"jwksd_alarms{alarm="no_standby"}"#).unwrap();
    a.set_alarms([Alarm::NoStandby, Alarm::DestructionPending]);
    b.set_alarms([Alarm::NoStandby, Alarm::NoStandby]);
    metrics.set_alarm(Alarm::NoStandby, 5);
    assert_eq!(no_standby(), 7.0);
    assert_eq!(value(&metrics, r#"jwksd_alarms{alarm="destruction_pending"}"#), Some(1.0));
    a.set_alarms([]);
    assert_eq!(no_standby(), 6.0);
    metrics.unregister_keyset(&name("b"));
    assert_eq!(no_standby(), 5.0);
}

#[test]
fn an_unregistered_keyset_leaves_no_series() {
    let metrics = Metrics::new();
    metrics.register_keyset(&name("a"), Algorithm::Es256, "local", &name("main"));
    metrics.register_keyset(&name("b"), Algorithm::Es256, "local", &name("main"));
    let orphan = metrics.register_keyset(&name("c"), Algorithm::Es256, "local", &name("other"));
    metrics.unregister_keyset(&name("a"));
    metrics.unregister_keyset(&name("c"));
    metrics.unregister_keyset(&name("never-registered"));
    orphan.signing(Algorithm::Es256, "local").signed(Duration::ZERO);
    let page = text(&metrics);
    for gone in [r#"keyset="a""#, r#"keyset="c""#, r#"issuer="other""#] {
        assert!(!page.contains(gone), "{gone}");
    }
    assert!(page.contains(r#"keyset="b""#) && page.contains(r#"issuer="main""#));
}

#[test]
fn a_keyset_that_changes_algorithm_or_backend_keeps_what_it_counted() {
    let metrics = Metrics::new();
    let rs256 = Algorithm::Rs256 { rsa_bits: RsaBits::B2048 };
    let old = metrics.register_keyset(&name("default"), rs256, "local", &name("main")).signing(rs256, "local");
    old.signed(Duration::ZERO);
    let new = metrics.register_keyset(&name("default"), Algorithm::Es256, "aws-kms", &name("main"));
    old.signed(Duration::ZERO);
    new.signing(Algorithm::Es256, "aws-kms").signed(Duration::ZERO);
    let signatures = |alg, backend| {
        let series = format!(r#"jwksd_signatures_total{{keyset="default",alg="{alg}",backend="{backend}"}}"#);
        value(&metrics, &series)
    };
    assert_eq!(signatures("RS256", "local"), Some(2.0));
    assert_eq!(signatures("ES256", "aws-kms"), Some(1.0));
    assert_eq!(signatures("ES256", "local"), None);
}

#[test]
fn handles_of_many_threads_lose_no_count() {
    let metrics = Metrics::new();
    let keyset = metrics.register_keyset(&name("default"), Algorithm::Es256, "local", &name("main"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let signing = keyset.signing(Algorithm::Es256, "local");
            scope.spawn(move || (0..10_000).for_each(|i| signing.signed(Duration::from_nanos(i))));
        }
    });
    let labels = r#"{keyset="default",backend="local"}"#;
    assert_eq!(value(&metrics, &format!("jwksd_sign_duration_seconds_count{labels}")), Some(40_000.0));
}

#[test]
fn both_formats_have_the_same_samples() {
    let metrics = Metrics::new();
    metrics.register_keyset(&name("default"), Algorithm::Es256, "local", &name("main"));
    let samples = |accept| {
        let (_, page) = metrics.render(accept);
        let volatile = |line: &&str| !line.starts_with('#') && !line.starts_with("process_");
        page.lines().filter(volatile).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(samples(None), samples(Some("application/openmetrics-text; version=1.0.0")));
}

#[test]
fn every_alg_has_a_series_of_its_own() {
    let bits = RsaBits::B4096;
    let all = [
        Algorithm::Es256,
        Algorithm::Es384,
        Algorithm::Rs256 { rsa_bits: bits },
        Algorithm::Ps256 { rsa_bits: bits },
        Algorithm::EdDsa { label: crate::keyring::algorithm::EdLabel::EdDsa },
        Algorithm::EdDsa { label: crate::keyring::algorithm::EdLabel::Ed25519 },
    ];
    let indices: std::collections::BTreeSet<_> = all.into_iter().map(alg_index).collect();
    assert_eq!(indices.len(), Algorithm::ALL_ALGS.len());
}
