//! Request bodies: of bounded size, complete in time, read into one piece.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::BoxError;
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, Sleep, sleep_until};

use super::problem::{Problem, ProblemType};

/// The most bytes a request's body may have, except for reports of replicas.
pub const BODY_LIMIT: usize = 64 * 1024;

/// Reads a whole body. 413, 408 or 400 as a problem where it is too large, too slow or breaks off.
pub async fn read(body: Body) -> Result<Bytes, Problem> {
    read_up_to(body, BODY_LIMIT).await
}

/// As [`read`], where more may come; the listener must let it through.
pub(super) async fn read_up_to(mut body: Body, limit: usize) -> Result<Bytes, Problem> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(problem_of)?.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Err(ProblemType::BodyTooLarge.into());
        }
        // Nearly every body arrives in one frame, which is then not copied.
        if first.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    let mut whole = BytesMut::with_capacity(first.len() + rest.len());
    whole.extend_from_slice(&first);
    whole.extend_from_slice(&rest);
    Ok(whole.freeze())
}

/// A body that ends with an error when it grows past its limit or takes longer than its deadline.
pub(super) struct Limited {
    inner: Body,
    left: usize,
    deadline: Instant,
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Limited {
    pub(super) fn new(inner: Body, limit: usize, timeout: Duration) -> Self {
        Limited { inner, left: limit, deadline: Instant::now() + timeout, alarm: None }
    }
}

impl HttpBody for Limited {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match Pin::new(&mut self.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let size = frame.data_ref().map_or(0, Bytes::len);
                if size > self.left {
                    return Poll::Ready(Some(Err(BodyError::TooLarge.into())));
                }
                self.left -= size;
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(other) => Poll::Ready(other.map(|result| result.map_err(BoxError::from))),
            Poll::Pending => {
                let deadline = self.deadline;
                let alarm = self.alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
                ready!(alarm.as_mut().poll(cx));
                Poll::Ready(Some(Err(BodyError::Timeout.into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Why a request's body was not read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("reading a request's body: it is larger than it may be")]
    TooLarge,
    #[error("reading a request's body: it did not arrive in time")]
    Timeout,
}

fn problem_of(error: axum::Error) -> Problem {
    // Frames pass through nested `Body`s, each of which wraps the error once more.
    let mut error: BoxError = error.into_inner();
    loop {
        error = match error.downcast::<axum::Error>() {
            Ok(inner) => inner.into_inner(),
            Err(other) => match other.downcast_ref() {
                Some(BodyError::TooLarge) => return ProblemType::BodyTooLarge.into(),
                Some(BodyError::Timeout) => return ProblemType::BodyTimeout.into(),
                None => return Problem::new(ProblemType::MalformedRequest).detail("The request's body broke off."),
            },
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body whose frames arrive with pauses between them.
    fn slow(frames: Vec<&'static [u8]>, pause: Duration) -> Body {
        struct Slow(std::vec::IntoIter<&'static [u8]>, Duration, Option<Pin<Box<Sleep>>>);
        impl HttpBody for Slow {
            type Data = Bytes;
            type Error = std::convert::Infallible;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
                let pause = self.1;
                let alarm = self.2.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
                ready!(alarm.as_mut().poll(cx));
                self.2 = None;
                Poll::Ready(self.0.next().map(|bytes| Ok(Frame::data(Bytes::from_static(bytes)))))
            }
        }
        Body::new(Slow(frames.into_iter(), pause, None))
    }

    fn limited(body: Body) -> Body {
        Body::new(Limited::new(body, BODY_LIMIT, Duration::from_secs(10)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_in_pieces_is_read_whole() {
        let body = limited(slow(vec![b"ab", b"cd", b"e"], Duration::from_secs(1)));
        assert_eq!(read(body).await.unwrap(), "abcde");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_is_a_timeout_however_steadily_it_drips() {
        let body = limited(slow(vec![b"x"; 100], Duration::from_secs(1)));
        assert_eq!(read(body).await.unwrap_err().kind(), ProblemType::BodyTimeout);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_of_unknown_length_may_not_grow_past_the_limit() {
        static CHUNK: [u8; BODY_LIMIT / 2] = [0; BODY_LIMIT / 2];
        assert_eq!(read(slow(vec![&CHUNK, &CHUNK], Duration::ZERO)).await.unwrap().len(), BODY_LIMIT);
        let too_large = || slow(vec![&CHUNK, &CHUNK, b"x"], Duration::ZERO);
        assert_eq!(read(too_large()).await.unwrap_err().kind(), ProblemType::BodyTooLarge);
        assert_eq!(read(limited(too_large())).await.unwrap_err().kind(), ProblemType::BodyTooLarge);
    }
}
