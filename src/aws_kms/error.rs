//! Why AWS KMS did not do what was asked, by what the caller does next.

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;

use zeroize::Zeroizing;

use super::KmsOperation;

/// A call that failed. Its text names the call, the key and what to do, and carries nothing secret.
#[derive(Clone, Debug, thiserror::Error)]
#[error("AWS KMS {} {key}: {kind}{}; {}", .operation.as_str(), bracketed(.detail), .kind.advice())]
pub struct KmsError {
    pub operation: KmsOperation,
    /// What the call was about: a key or an alias, as it was asked for.
    pub key: String,
    pub kind: KmsErrorKind,
    /// Code, message and request ID of the service, where they can be shown; or what the network said.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum KmsErrorKind {
    /// The network, or a 5xx.
    #[error("cannot be reached or is failing")]
    Unavailable,
    #[error("no answer in time")]
    Timeout,
    #[error("throttled")]
    Throttled,
    /// No permission, or credentials that are missing, expired or wrong.
    #[error("access denied")]
    Denied,
    #[error("the key is disabled")]
    Disabled,
    /// Also a key being imported, or one whose key store is away.
    #[error("the key is pending deletion or in another state that forbids it")]
    InvalidState,
    #[error("there is no such key or alias")]
    NotFound,
    #[error("it exists already")]
    AlreadyExists,
    #[error("the ciphertext was not made by this key for this context, or was changed since")]
    InvalidCiphertext,
    /// A quota of the account: keys, aliases, tags.
    #[error("a quota of the account is used up")]
    Quota,
    /// The service does not know this kind of key or request, or the key cannot do it.
    #[error("refused as invalid or unsupported")]
    Unsupported,
    #[error("failed")]
    Other,
}

impl KmsErrorKind {
    /// Whether the same request may succeed soon.
    pub const fn is_transient(self) -> bool {
        matches!(self, KmsErrorKind::Unavailable | KmsErrorKind::Timeout | KmsErrorKind::Throttled)
    }

    const fn advice(self) -> &'static str {
        match self {
            KmsErrorKind::Unavailable | KmsErrorKind::Timeout => {
                "check the network, [backend.aws-kms] region and endpoint_url, and the AWS status page"
            }
            KmsErrorKind::Throttled => "ask AWS for a higher request quota, or sign locally under a KMS seal",
            KmsErrorKind::Denied => {
                "check the credentials and compare the role with the policies in deploy/aws (docs/aws-kms.md)"
            }
            KmsErrorKind::Disabled => "enable the key again, or revoke it if that was meant",
            KmsErrorKind::InvalidState => "cancel its deletion and enable it, or revoke it if that was meant",
            KmsErrorKind::NotFound => "check [backend.aws-kms] region and the account of the credentials",
            KmsErrorKind::AlreadyExists => "use what exists",
            KmsErrorKind::InvalidCiphertext => "use the key that sealed it; see docs/restore.md",
            KmsErrorKind::Quota => "ask AWS for a higher quota, or delete what nobody uses",
            KmsErrorKind::Unsupported => "choose another algorithm or key, or a region that offers it",
            KmsErrorKind::Other => "see docs/aws-kms.md",
        }
    }
}

fn bracketed(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}

/// Longer texts of the service are cut.
const DETAIL_MAX: usize = 400;

impl KmsError {
    pub(super) fn new(operation: KmsOperation, key: &str, kind: KmsErrorKind, detail: &str) -> Self {
        // One line, no control characters: it is logged.
        let clean = detail.chars().map(|c| if c.is_control() { ' ' } else { c });
        KmsError { operation, key: key.to_owned(), kind, detail: clean.take(DETAIL_MAX).collect() }
    }

    pub(super) fn from_sdk<E>(operation: KmsOperation, key: &str, error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        let (kind, detail) = match error {
            SdkError::ServiceError(service) => {
                let status = service.raw().status().as_u16();
                let meta = service.err().meta();
                let kind = kind_of(meta.code(), meta.message(), status);
                (kind, described(kind, meta.code(), meta.message(), status, meta.request_id()))
            }
            SdkError::TimeoutError(_) => (KmsErrorKind::Timeout, String::new()),
            SdkError::DispatchFailure(failure) => match failure.as_connector_error() {
                Some(connector) if connector.is_timeout() => (KmsErrorKind::Timeout, "connecting".to_owned()),
                Some(connector) => without_answer(connector),
                None => (KmsErrorKind::Unavailable, String::new()),
            },
            SdkError::ResponseError(response) => {
                let status = response.raw().status().as_u16();
                (KmsErrorKind::Unavailable, format!("HTTP {status}, an answer that cannot be read"))
            }
            other => without_answer(other),
        };
        KmsError::new(operation, key, kind, &detail)
    }
}

/// The request was not sent, or nothing came back: credentials or the network.
fn without_answer(error: &(dyn std::error::Error + 'static)) -> (KmsErrorKind, String) {
    let mut texts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(credentials) = cause.downcast_ref::<CredentialsError>() {
            return without_credentials(credentials);
        }
        let text = cause.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
        next = cause.source();
    }
    (KmsErrorKind::Unavailable, texts.join(": "))
}

/// Credentials could not be loaded. Only what somebody has to put right is a refusal: the service behind the chain may be
/// away as any other. The causes may quote files and answers with credentials in them, and are not shown.
fn without_credentials(error: &CredentialsError) -> (KmsErrorKind, String) {
    let (kind, class) = match error {
        CredentialsError::ProviderTimedOut(_) => (KmsErrorKind::Timeout, "nothing in time"),
        CredentialsError::CredentialsNotLoaded(_) => (KmsErrorKind::Denied, "none were found"),
        CredentialsError::InvalidConfiguration(_) => (KmsErrorKind::Denied, "their configuration is invalid"),
        CredentialsError::ProviderError(_) => (KmsErrorKind::Unavailable, "their provider failed"),
        _ => (KmsErrorKind::Unavailable, "their provider's answer cannot be used"),
    };
    match (kind, status_in(error)) {
        (KmsErrorKind::Unavailable, Some(status)) => {
            let kind = match status {
                408 => KmsErrorKind::Timeout,
                429 => KmsErrorKind::Throttled,
                400..=499 => KmsErrorKind::Denied,
                _ => KmsErrorKind::Unavailable,
            };
            (kind, format!("loading credentials: {class}, HTTP {status}"))
        }
        _ => (kind, format!("loading credentials: {class}")),
    }
}

/// The HTTP status in the answer of a credential service. The errors of these services have types of their own, which
/// agree in nothing but how they print a status; all they print may hold credentials, so it is wiped.
fn status_in(error: &CredentialsError) -> Option<u16> {
    const BEFORE: &str = "StatusCode(";
    let printed = Zeroizing::new(format!("{error:?}"));
    let (_, rest) = printed.split_once(BEFORE)?;
    rest.split_once(')')?.0.parse().ok()
}

/// Which of our kinds a code of the service is; they are stable, messages are not.
fn kind_of(code: Option<&str>, message: Option<&str>, status: u16) -> KmsErrorKind {
    match code.unwrap_or_default() {
        "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "SlowDown" => KmsErrorKind::Throttled,
        "AccessDeniedException"
        | "AccessDenied"
        | "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidClientTokenIdException"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "ExpiredTokenException"
        | "ExpiredToken"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "NotAuthorized"
        | "OptInRequired"
        | "RequestExpired" => KmsErrorKind::Denied,
        "DisabledException" => KmsErrorKind::Disabled,
        // Some answers call a disabled key an invalid state.
        "KMSInvalidStateException" | "KmsInvalidStateException" => {
            let disabled = message.is_some_and(|message| message.contains("is disabled"));
            if disabled { KmsErrorKind::Disabled } else { KmsErrorKind::InvalidState }
        }
        "NotFoundException" => KmsErrorKind::NotFound,
        "AlreadyExistsException" => KmsErrorKind::AlreadyExists,
        "InvalidCiphertextException" | "IncorrectKeyException" => KmsErrorKind::InvalidCiphertext,
        "LimitExceededException" => KmsErrorKind::Quota,
        "UnsupportedOperationException"
        | "ValidationException"
        | "ValidationError"
        | "InvalidKeyUsageException"
        | "InvalidArnException"
        | "InvalidAliasNameException"
        | "TagException" => KmsErrorKind::Unsupported,
        "KMSInternalException"
        | "KeyUnavailableException"
        | "DependencyTimeoutException"
        | "InternalFailure"
        | "InternalError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException" => KmsErrorKind::Unavailable,
        _ if status == 429 => KmsErrorKind::Throttled,
        _ if status >= 500 => KmsErrorKind::Unavailable,
        _ if matches!(status, 401 | 403) => KmsErrorKind::Denied,
        _ => KmsErrorKind::Other,
    }
}

fn described(
    kind: KmsErrorKind,
    code: Option<&str>,
    message: Option<&str>,
    status: u16,
    request_id: Option<&str>,
) -> String {
    let mut text = format!("HTTP {status}");
    if let Some(code) = code {
        text = format!("{text}, {code}");
    }
    // What is said about a wrong signature quotes the request with its security token.
    let quotes_request = code.is_some_and(|code| code.contains("Signature"));
    if let Some(message) = message.filter(|_| !quotes_request && kind != KmsErrorKind::InvalidCiphertext) {
        let message: String = message.chars().take(DETAIL_MAX / 2).collect();
        text = format!("{text}: {message}");
    }
    if let Some(id) = request_id {
        text = format!("{text}, request {id}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_the_service_are_told_apart() {
        for (code, kind) in [
            ("ThrottlingException", KmsErrorKind::Throttled),
            ("AccessDeniedException", KmsErrorKind::Denied),
            ("ExpiredTokenException", KmsErrorKind::Denied),
            ("InvalidSignatureException", KmsErrorKind::Denied),
            ("DisabledException", KmsErrorKind::Disabled),
            ("KMSInvalidStateException", KmsErrorKind::InvalidState),
            ("NotFoundException", KmsErrorKind::NotFound),
            ("AlreadyExistsException", KmsErrorKind::AlreadyExists),
            ("InvalidCiphertextException", KmsErrorKind::InvalidCiphertext),
            ("LimitExceededException", KmsErrorKind::Quota),
            ("UnsupportedOperationException", KmsErrorKind::Unsupported),
            ("KMSInternalException", KmsErrorKind::Unavailable),
            ("SomethingNewException", KmsErrorKind::Other),
        ] {
            assert_eq!(kind_of(Some(code), None, 400), kind, "{code}");
        }
        assert_eq!(kind_of(None, None, 503), KmsErrorKind::Unavailable);
        assert_eq!(kind_of(None, None, 429), KmsErrorKind::Throttled);
        assert_eq!(kind_of(None, None, 403), KmsErrorKind::Denied);
        let disabled = Some("arn:aws:kms:… is disabled.");
        assert_eq!(kind_of(Some("KMSInvalidStateException"), disabled, 400), KmsErrorKind::Disabled);
    }

    #[test]
    fn a_wrong_signature_is_not_described_with_the_request_it_quotes() {
        let quoted = Some("The Canonical String was 'x-amz-security-token:SECRET'");
        let text = described(KmsErrorKind::Denied, Some("InvalidSignatureException"), quoted, 400, None);
        assert!(!text.contains("SECRET"), "{text}");
    }

    /// As STS does it, and as the container's credential service does.
    #[test]
    fn credentials_that_cannot_be_loaded_are_an_outage_unless_somebody_refuses_them() {
        let sts = |status: u16| {
            let raw = HttpResponse::new(status.try_into().unwrap(), "<SECRET/>".into());
            CredentialsError::provider_error(SdkError::service_error(std::io::Error::other("x"), raw))
        };
        let container = |status| {
            CredentialsError::provider_error(format!("Non-success status from HTTP credential provider: {status}"))
        };
        for (error, kind, status) in [
            (sts(403), KmsErrorKind::Denied, "HTTP 403"),
            (sts(400), KmsErrorKind::Denied, "HTTP 400"),
            (sts(429), KmsErrorKind::Throttled, "HTTP 429"),
            (sts(503), KmsErrorKind::Unavailable, "HTTP 503"),
            (container("StatusCode(500)"), KmsErrorKind::Unavailable, "HTTP 500"),
            (container("StatusCode(404)"), KmsErrorKind::Denied, "HTTP 404"),
            (CredentialsError::provider_error("connection refused"), KmsErrorKind::Unavailable, "provider failed"),
            (CredentialsError::unhandled("half an answer"), KmsErrorKind::Unavailable, "cannot be used"),
            (CredentialsError::not_loaded("nothing"), KmsErrorKind::Denied, "none were found"),
            (CredentialsError::invalid_configuration("x"), KmsErrorKind::Denied, "configuration is invalid"),
        ] {
            let (found, text) = without_answer(&error);
            assert_eq!(found, kind, "{text}");
            assert!(text.contains(status) && !text.contains("SECRET"), "{text}");
        }
    }

    #[test]
    fn an_error_names_the_call_the_key_and_what_to_do() {
        let error = KmsError::new(KmsOperation::Sign, "arn:aws:kms:eu:1:key/2", KmsErrorKind::Denied, "HTTP\n400");
        let text = error.to_string();
        for part in ["Sign", "arn:aws:kms:eu:1:key/2", "access denied", "HTTP 400", "deploy/aws"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
