//! The same work on thousands of keysets, some at a time.

use std::future::Future;

use tokio::task::JoinSet;

/// Keysets that are loaded or opened at once: all processors have something to do, and nobody waits for one slow file.
const SIDE_BY_SIDE: usize = 16;

/// Runs `work` on all items, some at a time; what comes of them stays in their order.
pub(super) async fn side_by_side<T, R, W>(items: Vec<T>, work: impl Fn(T) -> W) -> Vec<R>
where
    R: Send + 'static,
    W: Future<Output = R> + Send + 'static,
{
    let mut done: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let (mut items, mut running) = (items.into_iter().enumerate(), JoinSet::new());
    loop {
        while running.len() < SIDE_BY_SIDE
            && let Some((at, item)) = items.next()
        {
            let work = work(item);
            running.spawn(async move { (at, work.await) });
        }
        match running.join_next().await {
            Some(Ok((at, result))) => done[at] = Some(result),
            // As if it had been done here.
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Only a runtime that ends aborts it, and this with it.
            Some(Err(_)) => {}
            None => return done.into_iter().flatten().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn results_keep_their_order_and_only_some_are_under_way() {
        let (under_way, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let results = side_by_side((0..100).collect(), |number: u64| {
            let (under_way, most) = (under_way.clone(), most.clone());
            async move {
                most.fetch_max(under_way.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // Later ones end first.
                for _ in number..100 {
                    tokio::task::yield_now().await;
                }
                under_way.fetch_sub(1, Ordering::SeqCst);
                number
            }
        });
        assert_eq!(results.await, (0..100).collect::<Vec<_>>());
        assert_eq!(most.load(Ordering::SeqCst), SIDE_BY_SIDE);
    }
}
