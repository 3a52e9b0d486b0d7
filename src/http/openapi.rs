//! `GET /openapi.json`: OpenAPI 3.1, made from the handlers and types themselves.

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::OpenApi;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBody;
use utoipa::openapi::schema::{AnyOfBuilder, ObjectBuilder, Schema, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, PathItem, Ref, RefOr, ResponseBuilder};

use super::problem::PROBLEM_JSON;
use super::{admin, import, overview, replication, signer};

/// RFC 9457 problem details.
#[derive(Serialize, utoipa::ToSchema)]
pub struct ProblemBody {
    /// One of the closed list in the README, such as `urn:jwksd:problem:ttl-too-long`.
    r#type: String,
    title: String,
    status: u16,
    detail: String,
    request_id: Option<String>,
    retry_after_seconds: Option<u64>,
    /// When a refused rotation can happen: with `no-standby` and `jwks-full`.
    #[schema(format = DateTime)]
    next_standby_at: Option<String>,
    /// What is wrong with the configuration: with `configuration-invalid`.
    errors: Option<Vec<String>>,
    /// What is not ready: with `not-ready`.
    missing: Option<Vec<String>>,
}

/// A JSON Web Key Set (RFC 7517 §5) of public keys.
#[derive(Serialize, utoipa::ToSchema)]
pub struct JwksBody {
    keys: Vec<JwkBody>,
}

/// A public key: `kty`, `kid`, `use`, `alg` and the members of its type.
#[derive(Serialize, utoipa::ToSchema)]
pub struct JwkBody {
    kty: String,
    kid: String,
    r#use: String,
    alg: String,
    /// EC and OKP keys.
    crv: Option<String>,
    x: Option<String>,
    /// EC keys.
    y: Option<String>,
    /// RSA keys.
    n: Option<String>,
    e: Option<String>,
}

/// OpenID Connect Discovery §3 and RFC 8414 §2, as little as a verifier needs.
#[derive(Serialize, utoipa::ToSchema)]
pub struct DiscoveryBody {
    issuer: String,
    jwks_uri: String,
    response_types_supported: Vec<String>,
    subject_types_supported: Vec<String>,
    id_token_signing_alg_values_supported: Vec<String>,
}

#[derive(Serialize, utoipa::ToSchema)]
pub struct AliveBody {
    alive: bool,
}

#[derive(Serialize, utoipa::ToSchema)]
pub struct ReadyBody {
    ready: bool,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "jwksd", description = "Signing keys of JWT issuers: rotation, publication, signatures. The tag of an operation names the listener that serves it. Paths of the public listener stand below the path of the issuer's URL."),
    paths(
        jwks, openid_configuration, authorization_server,
        signer::sign,
        admin::list, admin::show, admin::rotate, admin::rollback, admin::compromise, admin::revoke,
        admin::drain, admin::undrain, admin::hold, admin::resume, admin::show_clock, admin::accept_clock, admin::reload, admin::audit, import::import,
        overview::timeline, overview::replicas, overview::whoami,
        openapi_json,
        replication::index, replication::installation, replication::keyring, replication::report, replication::leave,
        livez, readyz, readyz_sign, metrics,
    ),
    components(schemas(ProblemBody, signer::SignerView)),
    modifiers(&Common),
)]
struct Api;

// Operations whose handlers are no plain functions of a path; these stand for them in the description only.

#[utoipa::path(get, path = "/.well-known/jwks.json", tag = "public", responses(
    (status = 200, body = JwksBody, content_type = "application/jwk-set+json"), (status = 304, description = "Unchanged since the ETag in If-None-Match")))]
#[allow(dead_code, reason = "read by the macro only")]
fn jwks() {}

#[utoipa::path(get, path = "/.well-known/openid-configuration", tag = "public", responses((status = 200, body = DiscoveryBody)))]
#[allow(dead_code, reason = "read by the macro only")]
fn openid_configuration() {}

#[utoipa::path(get, path = "/.well-known/oauth-authorization-server", tag = "public", responses((status = 200, body = DiscoveryBody)))]
#[allow(dead_code, reason = "read by the macro only")]
fn authorization_server() {}

#[utoipa::path(get, path = "/openapi.json", tag = "admin", responses((status = 200, body = serde_json::Value)))]
#[allow(dead_code, reason = "read by the macro only")]
fn openapi_json() {}

#[utoipa::path(get, path = "/livez", tag = "ops", responses((status = 200, body = AliveBody)))]
#[allow(dead_code, reason = "read by the macro only")]
fn livez() {}

#[utoipa::path(get, path = "/readyz", tag = "ops", responses((status = 200, body = ReadyBody)))]
#[allow(dead_code, reason = "read by the macro only")]
fn readyz() {}

#[utoipa::path(get, path = "/readyz/sign", tag = "ops", responses((status = 200, body = ReadyBody)))]
#[allow(dead_code, reason = "read by the macro only")]
fn readyz_sign() {}

#[utoipa::path(get, path = "/metrics", tag = "ops", responses((status = 200, body = String, content_type = "text/plain")))]
#[allow(dead_code, reason = "read by the macro only")]
fn metrics() {}

/// What all operations, or all of a listener, have in common.
struct Common;

impl utoipa::Modify for Common {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(scheme));
        let description = Some("Where the listener has a client_ca_file".to_owned());
        let certificate = SecurityScheme::MutualTls { description, deprecated: None, extensions: None };
        components.add_security_scheme("certificate", certificate);
        for (path, item) in &mut api.paths.paths {
            let PathItem { get, put, post, delete, .. } = item;
            if let Some(show) = get.as_mut().filter(|_| path == SHARED) {
                share(show);
            }
            if let Some(reading) = get {
                complete(reading);
            }
            for changing in [put, post, delete].into_iter().flatten() {
                complete(changing);
                if let Some(RefOr::T(body)) = &mut changing.request_body {
                    leave_out_or_give(body);
                }
                if has_tag(changing, "admin") {
                    take_headers(changing);
                }
            }
        }
    }
}

/// Served by the admin listener and, with fewer members, by the signer listener.
const SHARED: &str = "/v1/keysets/{keyset}";

fn share(show: &mut Operation) {
    let schemas = AnyOfBuilder::new()
        .item(Ref::from_schema_name("KeysetView"))
        .item(Ref::from_schema_name("SignerView"))
        .description(Some("On the admin listener everything, on the signer listener what signing needs"));
    let answer = Content::new(Some(Schema::AnyOf(schemas.build())));
    let answer = ResponseBuilder::new().description("The keyset").content("application/json", answer).build();
    show.responses.responses.insert("200".to_owned(), answer.into());
    show.tags.get_or_insert_default().push("signer".to_owned());
}

fn has_tag(operation: &Operation, tag: &str) -> bool {
    operation.tags.iter().flatten().any(|other| other == tag)
}

/// Errors are problems everywhere. The signer takes a token only where clients are configured.
fn complete(operation: &mut Operation) {
    for (class, what) in [("4XX", "The request is refused"), ("5XX", "It cannot be done now")] {
        let body = Content::new(Some(Ref::from_schema_name("ProblemBody")));
        let problem = ResponseBuilder::new().description(what).content(PROBLEM_JSON, body).build();
        operation.responses.responses.entry(class.to_owned()).or_insert_with(|| problem.into());
    }
    let by = |scheme: &str| SecurityRequirement::new(scheme, Vec::<String>::new());
    operation.security = if has_tag(operation, "signer") {
        Some(vec![SecurityRequirement::default(), by("token"), by("certificate")])
    } else if has_tag(operation, "admin") {
        Some(vec![by("token"), by("certificate")])
    } else if has_tag(operation, "replication") {
        Some(vec![by("token")])
    } else {
        Some(Vec::new())
    };
}

/// A body that is not required may be left out. It may not be null, which the macro makes of an `Option`.
fn leave_out_or_give(body: &mut RequestBody) {
    for content in body.content.values_mut() {
        let RefOr::T(Content { schema: Some(schema), .. }) = content else { continue };
        let RefOr::T(Schema::OneOf(one_of)) = schema else { continue };
        let given = one_of.items.iter().find(|item| matches!(item, RefOr::Ref(_))).cloned();
        if let Some(given) = given {
            *schema = given;
        }
    }
}

/// `*`, or a list of entity tags (RFC 9110 §13.1.1).
const IF_MATCH: &str = r#"^(\*|(W/)?"[!#-~]*"([ \t]*,[ \t]*(W/)?"[!#-~]*")*)$"#;

fn take_headers(operation: &mut Operation) {
    let header = |name: &str, description: &str, pattern: &str, length: (usize, usize)| {
        let text = ObjectBuilder::new().schema_type(Type::String).pattern(Some(pattern));
        let text = text.min_length(Some(length.0)).max_length(Some(length.1)).build();
        let header = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Header);
        header.description(Some(description)).schema(Some(text)).build()
    };
    let key = "A repeated call with the same key within 24 hours gets the same answer and changes nothing";
    let generation = "ETags of the keyset, or where no keyset is named of /v1/clock: 412 when it has none of them now; weak tags never match";
    let headers = [
        header("Idempotency-Key", key, "^[!-~]([ -~]{0,253}[!-~])?$", (1, 255)),
        header("If-Match", generation, IF_MATCH, (1, 1000)),
    ];
    operation.parameters.get_or_insert_default().extend(headers.map(Into::into));
}

/// The document, as the code describes it.
pub fn api() -> utoipa::openapi::OpenApi {
    Api::openapi()
}

pub(super) async fn document() -> Response {
    Json(api()).into_response()
}
