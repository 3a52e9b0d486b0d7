//! The discovery document: OpenID Connect Discovery §4.2 and RFC 8414 §3.2, as little as a verifier needs, as
//! Kubernetes does.

/// The document of the issuer with this URL, whose keys have these `alg` values.
pub fn discovery_document(url: &str, algs: &[&str]) -> String {
    let document = serde_json::json!({
        "issuer": url,
        "jwks_uri": format!("{}/.well-known/jwks.json", url.trim_end_matches('/')),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": algs,
    });
    document.to_string()
}
