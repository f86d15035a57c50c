//! Parallel processing of many rows: short-lived threads map chunks of the rows, and the results are taken in order.
//!
//! Loading a large store uses it. It must not run during a request, because it uses several cores.

use std::num::NonZero;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

/// Maximum number of threads. With more threads, the consumer is the bottleneck.
const THREADS_MAX: usize = 8;
/// Number of mapped chunks per thread that may wait for the consumer. A mapped chunk may be larger than its input.
const CHUNKS_AHEAD_MAX: usize = 2;

/// Maps the items in chunks of `piece` items, and passes each result to `take` in the order of the items.
///
/// If there is only one chunk, or no thread can be started, the calling thread maps the chunks.
///
/// # Errors
/// The first error of `take`. No further result is taken after it.
pub(crate) fn map_chunks_in_order<T: Sync, R: Send, E>(
    items: &[T],
    piece: NonZero<usize>,
    map: impl Fn(&[T]) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let pieces = || items.chunks(piece.get());
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX).min(pieces().len());
    if threads < 2 {
        return pieces().try_for_each(|piece| take(map(piece)));
    }
    thread::scope(|scope| {
        let start = |first: usize| -> Option<Receiver<R>> {
            let (sender, receiver) = sync_channel(CHUNKS_AHEAD_MAX);
            let (map, mine) = (&map, pieces().skip(first).step_by(threads));
            let work = move || {
                for piece in mine {
                    if sender.send(map(piece)).is_err() {
                        return;
                    }
                }
            };
            thread::Builder::new().name("pieces".to_owned()).spawn_scoped(scope, work).ok().map(|_| receiver)
        };
        let working: Vec<Option<Receiver<R>>> = (0..threads).map(start).collect();
        for (piece, mapped) in pieces().zip(working.iter().cycle()) {
            let mapped = mapped.as_ref().and_then(|receiver| receiver.recv().ok());
            take(mapped.unwrap_or_else(|| map(piece)))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(items: &[u32], piece: usize) -> Vec<u32> {
        let mut out = Vec::new();
        let double = |piece: &[u32]| piece.iter().map(|item| item * 2).collect::<Vec<_>>();
        map_chunks_in_order(items, NonZero::new(piece).unwrap(), double, |piece| {
            out.extend(piece);
            Ok::<(), ()>(())
        })
        .unwrap();
        out
    }

    #[test]
    fn everything_is_taken_once_and_in_order() {
        for (count, piece) in [(0, 1), (1, 1), (7, 3), (1000, 1), (1000, 7), (1000, 999), (1000, 5000)] {
            let items: Vec<u32> = (0..count).collect();
            let expected: Vec<u32> = items.iter().map(|item| item * 2).collect();
            assert_eq!(joined(&items, piece), expected, "{count} by {piece}");
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let items: Vec<u32> = (0..1000).collect();
        let mut taken = 0;
        let outcome = map_chunks_in_order(&items, NonZero::new(10).unwrap(), <[u32]>::to_vec, |piece| {
            taken += 1;
            if piece.contains(&55) { Err("enough") } else { Ok(()) }
        });
        assert_eq!((outcome, taken), (Err("enough"), 6));
    }
}
