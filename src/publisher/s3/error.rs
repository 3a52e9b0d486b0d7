//! What went wrong at a storage, in words that help and without what it echoes of a request.

use object_store::Error;

use super::credentials::CREDENTIALS;
use crate::publisher::{Operation, PublishError};

/// Where an answer of the storage begins in the words of the client library.
const STATUS: &str = "non-2xx status code: ";

pub(super) fn failed(operation: Operation, place: String, error: Error) -> PublishError {
    let told = chain(&error);
    // The body of a refusal repeats parts of the request, the signature among them: its code is enough.
    let answer = told.split_once(STATUS).map(|(_, answer)| answer);
    let problem = match (&error, answer) {
        (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _) => format!(
            "access is denied{}: its policy must allow s3:GetObject and s3:PutObject on the object and s3:ListBucket \
             on the bucket, see docs/publishers.md",
            code(answer.unwrap_or_default())
        ),
        (Error::Generic { store: CREDENTIALS, .. }, _) => "no AWS credentials can be had".to_owned(),
        (Error::NotFound { .. }, _) => format!("the bucket does not exist{}", code(answer.unwrap_or_default())),
        (_, Some(answer)) => format!("the storage answers {}{}", status(answer), code(answer)),
        (_, None) => "the storage cannot be reached".to_owned(),
    };
    let source = if answer.is_some() { None } else { Some(error.into()) };
    PublishError::Failed { operation, place, problem, source }
}

/// The HTTP status at the beginning of an answer.
fn status(answer: &str) -> &str {
    answer.split([':', '\n']).next().unwrap_or_default().trim()
}

/// The error code in an answer's XML, in brackets.
fn code(answer: &str) -> String {
    let code = answer.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    let plain = |code: &&str| code.len() <= 64 && code.chars().all(|c| c.is_ascii_alphanumeric());
    code.map(|(code, _)| code).filter(plain).map(|code| format!(" ({code})")).unwrap_or_default()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_by_its_code_and_echoes_nothing() {
        let answer = "Server returned non-2xx status code: 403 Forbidden: <?xml?><Error><Code>SignatureDoesNotMatch</Code><SignatureProvided>f00d</SignatureProvided></Error>";
        let error = Error::PermissionDenied { path: "a".to_owned(), source: answer.into() };
        let PublishError::Failed { problem, source, .. } = failed(Operation::Write, "s3://b/a".to_owned(), error)
        else {
            panic!("another error");
        };
        assert!(problem.starts_with("access is denied (SignatureDoesNotMatch): "), "{problem}");
        assert!(source.is_none(), "it would be logged with the signature");
        let answer = "Server returned non-2xx status code: 503 Slow Down: <Error><Code>SlowDown</Code></Error>";
        let error = Error::Generic { store: "S3", source: answer.into() };
        let told = failed(Operation::Read, "s3://b/a".to_owned(), error).to_string();
        assert_eq!(told, "cannot read s3://b/a: the storage answers 503 Slow Down (SlowDown)");
    }
}
