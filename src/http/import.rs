//! `POST …/import`: a key from elsewhere joins a keyset.

use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use http::HeaderMap;
use http::header::ETAG;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::admin::{Actor, AdminState, etag};
use super::call::{Call, fingerprint_of};
use super::duration::DurationBody;
use super::json::JsonBody;
use super::openapi::ProblemBody;
use super::problem::{Problem, ProblemType};
use super::signer::TtlBody;
use crate::backend::RemoteFound;
use crate::backend::material::{PrivateKeyMaterial, import_public};
use crate::keyring::algorithm::Algorithm;
use crate::keyring::change::NewKey;
use crate::keyring::decide::{ImportedKey, Intent, Outcome};
use crate::keyring::jwk::{Kid, ParsedJwk, PublicJwk};
use crate::keyring::record::Keyring;
use crate::keyring::time::{Span, Timestamp};

/// A key to import: exactly one of `private_key`, `public_key` and `aws_kms`.
#[derive(Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportBody {
    /// PEM (PKCS#8, SEC 1, PKCS#1) or a private JWK as text. It joins as the active key, or with one active as standby.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    private_key: Option<PrivateText>,
    /// PEM (SPKI, PKCS#1) or a public JWK as text. It joins as retiring until `until`.
    #[serde(default)]
    public_key: Option<String>,
    /// ARN of a key in AWS KMS that signs, for a keyset with that backend. It joins as a private key does and stays its
    /// owner's: when it retires it is forgotten, not deleted.
    #[serde(default)]
    aws_kms: Option<String>,
    /// The kid under which verifiers know it; default: the JWK's own, else the RFC 7638 thumbprint.
    #[serde(default)]
    kid: Option<String>,
    /// Its `alg`, where a JWK does not say and the keyset does not decide.
    #[serde(default)]
    alg: Option<String>,
    /// The longest life of tokens it already signed.
    #[serde(default)]
    #[schema(value_type = Option<TtlBody>)]
    max_token_life: Option<DurationBody>,
    /// Since when verifiers can fetch it elsewhere: counts towards propagation.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    published_since: Option<Timestamp>,
    /// Public keys: until when it stays published.
    #[serde(default)]
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    dry_run: bool,
}

/// Wiped when dropped.
struct PrivateText(Zeroizing<String>);

impl<'de> Deserialize<'de> for PrivateText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| PrivateText(Zeroizing::new(text)))
    }
}

#[utoipa::path(post, path = "/v1/keysets/{keyset}/import", tag = "admin", params(("keyset" = String, Path)), request_body = ImportBody,
    responses((status = 200, body = Outcome), (status = 409, body = ProblemBody, content_type = "application/problem+json"), (status = 422, body = ProblemBody, content_type = "application/problem+json")))]
pub(super) async fn import(
    State(state): State<AdminState>,
    Extension(actor): Extension<Actor>,
    Path(keyset): Path<String>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<ImportBody>,
) -> Result<Response, Problem> {
    let cell = state.cell(&keyset)?;
    let keyring = cell.snapshot.load_full().keyring.clone();
    let remote = match &body.aws_kms {
        Some(arn) => Some(state.find_remote(&cell, arn).await?),
        None => None,
    };
    let brought = Brought::read(&body, remote, &keyring)?;
    let call = Call { action: "import", actor, headers, body: body.fingerprint(&brought) };
    let intent = Intent::Import(Box::new(brought.imported(&body)));
    let outcome = match (brought.private, brought.remote) {
        (Some(material), _) => state.import(&cell, intent, body.reason, body.dry_run, &call, material).await?,
        (None, Some(found)) => state.adopt(&cell, intent, body.reason, body.dry_run, &call, found).await?,
        (None, None) => state.carry_out(&cell, intent, body.reason, body.dry_run, &call).await?,
    };
    Ok(([(ETAG, etag(outcome.generation))], Json(outcome)).into_response())
}

/// The key of a request, validated.
struct Brought {
    public: PublicJwk,
    kid: Kid,
    algorithm: Algorithm,
    private: Option<PrivateKeyMaterial>,
    remote: Option<RemoteFound>,
}

impl Brought {
    /// `remote` is what `aws_kms` names.
    fn read(body: &ImportBody, remote: Option<RemoteFound>, keyring: &Keyring) -> Result<Self, Problem> {
        let (described, private) = match (&body.private_key, &body.public_key, &remote) {
            (None, None, Some(found)) => (ParsedJwk { public: found.public.clone(), kid: None, algorithm: None }, None),
            (Some(text), None, None) => {
                let imported =
                    PrivateKeyMaterial::import(text.0.as_bytes()).map_err(|error| refused(&error.to_string()))?;
                let public = imported.material.public().clone();
                let described = imported.described.unwrap_or(ParsedJwk { public, kid: None, algorithm: None });
                (described, Some(imported.material))
            }
            (None, Some(text), None) => {
                let mut keys = import_public(text.as_bytes()).map_err(|error| refused(&error.to_string()))?;
                match (keys.pop(), keys.is_empty()) {
                    (Some(key), true) => (key, None),
                    _ => {
                        return Err(refused(
                            "public_key must hold exactly one key: import the keys of a set one by one",
                        ));
                    }
                }
            }
            _ => return Err(refused("give exactly one of private_key, public_key and aws_kms")),
        };
        let algorithm = algorithm_of(&described, body.alg.as_deref(), keyring)?;
        let kid = match &body.kid {
            Some(kid) => Kid::parse(kid).map_err(|error| refused(&error.to_string()))?,
            None => described.kid_or_thumbprint(),
        };
        Ok(Brought { public: described.public, kid, algorithm, private, remote })
    }

    fn imported(&self, body: &ImportBody) -> ImportedKey {
        let Brought { public, kid, algorithm, .. } = self;
        ImportedKey {
            key: NewKey { kid: kid.clone(), algorithm: *algorithm, public: public.clone(), private: None },
            ttl_bound: body.max_token_life.map_or(Span::ZERO, |life| life.0),
            published_since: body.published_since,
            published_until: body.until,
        }
    }
}

impl ImportBody {
    /// Identifies the request without the private key: its public half stands for it.
    fn fingerprint(&self, brought: &Brought) -> String {
        #[derive(Serialize)]
        struct Essence<'a> {
            public: &'a PublicJwk,
            private: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            remote: Option<&'a str>,
            kid: &'a Kid,
            alg: &'static str,
            life: Option<DurationBody>,
            since: Option<Timestamp>,
            until: Option<Timestamp>,
            reason: &'a Option<String>,
            dry_run: bool,
        }
        fingerprint_of(&Essence {
            public: &brought.public,
            private: brought.private.is_some(),
            remote: brought.remote.as_ref().map(|found| found.name.as_str()),
            kid: &brought.kid,
            alg: brought.algorithm.alg(),
            life: self.max_token_life,
            since: self.published_since,
            until: self.until,
            reason: &self.reason,
            dry_run: self.dry_run,
        })
    }
}

/// One key, one algorithm (RFC 8725 §3.1): what the request says, else the JWK, else the keyset if the key fits it, else
/// the only one possible.
fn algorithm_of(described: &ParsedJwk, asked: Option<&str>, keyring: &Keyring) -> Result<Algorithm, Problem> {
    if let Some(alg) = asked {
        let named = described.public.algorithm_named(alg);
        return named.ok_or_else(|| refused(&format!("the key cannot be used with {alg}")));
    }
    if let Some(algorithm) = described.algorithm {
        return Ok(algorithm);
    }
    let possible = described.public.algorithms();
    let wanted = keyring.policy.algorithm.alg();
    if let Some(algorithm) = possible.iter().find(|algorithm| algorithm.alg() == wanted) {
        return Ok(*algorithm);
    }
    match possible.as_slice() {
        [only] => Ok(*only),
        several => {
            let names: Vec<_> = several.iter().map(|algorithm| algorithm.alg()).collect();
            Err(refused(&format!("the key may be used with {}: say which with alg", names.join(", "))))
        }
    }
}

fn refused(reason: &str) -> Problem {
    Problem::new(ProblemType::ImportRefused).detail(format!("The key cannot be imported: {reason}."))
}
