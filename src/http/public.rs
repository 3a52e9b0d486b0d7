//! What verifiers fetch: key sets and discovery documents. No authentication, read-only, rendered once per change.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, IF_NONE_MATCH,
};
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::access::Notes;
use super::conditional::names;
use super::middleware::{Answering, Routes, Shortcut};
use super::problem::{Problem, ProblemType};
use crate::engine::{Engine, IssuerCell, JwksDocument, RouteKind};
use crate::keyring::discovery::discovery_document;
use crate::telemetry::metrics::JwksCode;

const JWK_SET: HeaderValue = HeaderValue::from_static(RouteKind::Jwks.media_type());
const JSON: HeaderValue = HeaderValue::from_static(RouteKind::Discovery.media_type());
const ANYONE: HeaderValue = HeaderValue::from_static("*");

/// The routes of the public listener. Paths come from the configured issuers, so it matches them itself.
pub fn routes(engine: Arc<Engine>) -> Routes {
    Routes { router: Router::new(), shortcut: Some(Arc::new(Public { engine })) }
}

struct Public {
    engine: Arc<Engine>,
}

impl Shortcut for Public {
    fn takes(&self, _: &Request) -> bool {
        true
    }

    fn answer(&self, request: Request) -> Answering<'_> {
        Box::pin(std::future::ready(serve(&self.engine, &request)))
    }
}

fn serve(engine: &Engine, request: &Request) -> Response {
    let directory = engine.directory();
    let Some(route) = directory.routes.get(request.uri().path()) else {
        return ProblemType::NotFound.into_response();
    };
    Notes::path(request.extensions(), request.uri().path());
    let head = request.method() == Method::HEAD;
    if !head && request.method() != Method::GET {
        if route.kind == RouteKind::Jwks {
            route.issuer.metrics.jwks_requested(JwksCode::MethodNotAllowed);
        }
        let mut response = ProblemType::MethodNotAllowed.into_response();
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let Some(document) = route.issuer.served() else {
        if route.kind == RouteKind::Jwks {
            route.issuer.metrics.jwks_requested(JwksCode::Unavailable);
        }
        return Problem::new(ProblemType::JwksEmpty).retry_after(1).into_response();
    };
    match route.kind {
        RouteKind::Jwks => jwks(&route.issuer, &document, request.headers(), head),
        RouteKind::Discovery => discovery(&route.issuer, &document, head),
    }
}

fn jwks(issuer: &IssuerCell, document: &JwksDocument, headers: &HeaderMap, head: bool) -> Response {
    let known = headers.get_all(IF_NONE_MATCH).iter().any(|value| names(value, &document.etag));
    issuer.metrics.jwks_requested(if known { JwksCode::NotModified } else { JwksCode::Ok });
    let mut response = Response::new(Body::empty());
    let fields = response.headers_mut();
    fields.insert(CACHE_CONTROL, document.cache_control.clone());
    fields.insert(ETAG, document.etag.clone());
    fields.insert(ACCESS_CONTROL_ALLOW_ORIGIN, ANYONE);
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return response;
    }
    fields.insert(CONTENT_TYPE, JWK_SET);
    finish(response, document.body.clone(), head)
}

fn discovery(issuer: &IssuerCell, document: &JwksDocument, head: bool) -> Response {
    let body = discovery_document(&issuer.url, &document.algs);
    let mut response = Response::new(Body::empty());
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, JSON);
    fields.insert(CACHE_CONTROL, document.cache_control.clone());
    fields.insert(ACCESS_CONTROL_ALLOW_ORIGIN, ANYONE);
    finish(response, body.into(), head)
}

fn finish(mut response: Response, body: bytes::Bytes, head: bool) -> Response {
    if head {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    } else {
        *response.body_mut() = Body::from(body);
    }
    response
}
