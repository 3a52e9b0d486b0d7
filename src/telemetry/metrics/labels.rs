//! The closed sets of label values. Everything that becomes a label comes from here, from a validated name or from
//! [`Algorithm::ALL_ALGS`](crate::keyring::algorithm::Algorithm::ALL_ALGS), so the number of series is bounded.

use crate::keyring::change::Trigger;
use crate::keyring::claims::Rejection;

macro_rules! label_values {
    ($(#[$attribute:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident => $text:literal,)+ }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// Every value, in order of declaration.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];

            /// How many values there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The value as it stands in metrics, answers and logs.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }

            /// The position in [`ALL`](Self::ALL).
            pub const fn index(self) -> usize {
                self as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}

label_values! {
    /// Why a signature that the policy allows was not made: our failures, never the caller's.
    SigningFailure {
        /// The backend could not be reached, or failed in a way that says nothing else.
        BackendUnavailable => "backend_unavailable",
        /// No answer within `sign_deadline`.
        BackendTimeout => "backend_timeout",
        /// The backend throttled until the deadline.
        BackendThrottled => "backend_throttled",
        /// The backend refused our credentials.
        BackendDenied => "backend_denied",
        /// The backend holds the key disabled or pending deletion.
        KeyDisabled => "key_disabled",
        /// What the backend returned is not a signature of the published key.
        VerificationFailed => "verification_failed",
        /// The keyring was not confirmed with the store for longer than `staleness_limit`.
        StaleKeyring => "stale_keyring",
        /// The keyset has no key that may sign.
        NoActiveKey => "no_active_key",
        /// The keyset's queue is full.
        Overload => "overload",
        /// Whether the caller is a service account cannot be told: the cluster's keys are not there.
        ClusterKeysUnavailable => "cluster_keys_unavailable",
    }
}

label_values! {
    /// Why a request for a signature was refused: the caller's errors.
    SignRejection {
        /// Lifetime out of bounds.
        Ttl => "ttl",
        /// A claim is missing, forbidden or of the wrong type; a missing `aud` too.
        Claims => "claims",
        /// An audience that this keyset or client may not name.
        Audience => "audience",
        /// The client is unknown or may not use this keyset.
        Unauthorized => "unauthorized",
        /// The request cannot be read.
        Malformed => "malformed",
        /// An operator ended the keyset.
        Drained => "drained",
    }
}

label_values! {
    /// What a backend was asked to do.
    BackendOperation {
        /// Make a key.
        Create => "create",
        /// Make a stored key ready to sign.
        Open => "open",
        /// Sign.
        Sign => "sign",
        /// Destroy a private half.
        Destroy => "destroy",
        /// Take over an existing private key.
        Import => "import",
        /// Seal a data key with the seal's key.
        Encrypt => "encrypt",
        /// Unseal a data key with the seal's key.
        Decrypt => "decrypt",
        /// Say which key the seal's name means.
        Describe => "describe",
    }
}

label_values! {
    /// How a request to a backend ended.
    BackendOutcome {
        /// It did what was asked.
        Ok => "ok",
        /// It could not be reached.
        Unavailable => "unavailable",
        /// No answer in time.
        Timeout => "timeout",
        /// It throttled.
        Throttled => "throttled",
        /// It refused our credentials.
        Denied => "denied",
        /// The key is disabled or pending deletion.
        KeyDisabled => "key_disabled",
        /// The key does not exist.
        NotFound => "not_found",
        /// Anything else: an unreadable key, a failed pairwise test, an internal failure.
        Failed => "failed",
    }
}

label_values! {
    /// What made another key sign.
    RotationTrigger {
        /// The first key of a keyset.
        First => "first",
        /// The schedule.
        Schedule => "schedule",
        /// An operator's `rotate`.
        Operator => "operator",
        /// An operator's `rollback`.
        Rollback => "rollback",
        /// The active key was revoked.
        Revocation => "revocation",
        /// Every key of the keyset was revoked.
        Compromise => "compromise",
        /// The backend holds the active key disabled.
        KeyDisabled => "key_disabled",
        /// An imported key signs at once.
        Import => "import",
    }
}

label_values! {
    /// The step of a rotation that failed.
    RotationStep {
        /// Making a successor.
        Create => "create",
        /// Storing it and putting it into the JWKS.
        Publish => "publish",
        /// Waiting until every verifier has it.
        Propagate => "propagate",
        /// Letting it sign.
        Promote => "promote",
        /// Removing a key whose last token has expired.
        Retire => "retire",
        /// Destroying a private half.
        Destroy => "destroy",
        /// Writing a changed policy into the keyring.
        Policy => "policy",
    }
}

label_values! {
    /// Why a step of a rotation failed.
    RotationFailureReason {
        /// The backend failed; `jwksd_backend_requests_total` says how.
        Backend => "backend",
        /// The new key failed its sign/verify test.
        PairwiseTest => "pairwise_test",
        /// The store could not be read or written.
        Store => "store",
        /// The seal could not be used.
        Seal => "seal",
        /// One more key would break the limits of the JWKS.
        Room => "room",
        /// The clock is frozen.
        Clock => "clock",
        /// A probe does not see the published document.
        Probe => "probe",
        /// A failure of the daemon itself.
        Internal => "internal",
    }
}

label_values! {
    /// How it went with notices to receivers.
    NoticeOutcome {
        /// The receiver took it.
        Delivered => "delivered",
        /// An attempt failed.
        Failed => "failed",
        /// It was given up, or left the journal untold.
        Dropped => "dropped",
    }
}

// Alarms are decided by the core, which names them.
pub use crate::keyring::outlook::Alarm;

label_values! {
    /// The status of an answer to a request for a JWKS.
    JwksCode {
        /// The document.
        Ok => "200",
        /// The verifier has it already.
        NotModified => "304",
        /// Neither GET nor HEAD.
        MethodNotAllowed => "405",
        /// No key to publish, or not ready.
        Unavailable => "503",
        /// Any other status.
        Other => "other",
    }
}

impl JwksCode {
    /// The label of an HTTP status.
    pub const fn from_status(status: u16) -> Self {
        match status {
            200 => JwksCode::Ok,
            304 => JwksCode::NotModified,
            405 => JwksCode::MethodNotAllowed,
            503 => JwksCode::Unavailable,
            _ => JwksCode::Other,
        }
    }
}

impl From<Trigger> for RotationTrigger {
    fn from(trigger: Trigger) -> Self {
        match trigger {
            Trigger::First => RotationTrigger::First,
            Trigger::Schedule => RotationTrigger::Schedule,
            Trigger::Operator => RotationTrigger::Operator,
            Trigger::Rollback => RotationTrigger::Rollback,
            Trigger::Revocation => RotationTrigger::Revocation,
            Trigger::Compromise => RotationTrigger::Compromise,
            Trigger::KeyDisabled => RotationTrigger::KeyDisabled,
            Trigger::Import => RotationTrigger::Import,
        }
    }
}

impl From<Rejection> for SignRejection {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Ttl => SignRejection::Ttl,
            Rejection::Claims => SignRejection::Claims,
            Rejection::Audience => SignRejection::Audience,
            Rejection::Malformed => SignRejection::Malformed,
        }
    }
}
