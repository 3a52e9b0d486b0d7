//! A store whose calls are spans of traces.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use tracing::{Instrument, Span};

use super::shared::SharedStore;
use super::{Digest, Document, Store, StoreError};
use crate::keyring::name::Name;
use crate::telemetry::traces;

/// Passes everything on. Watching for other replicas' writes is no span: it waits most of the time.
pub struct TracedStore(pub Arc<dyn Store>);

impl TracedStore {
    fn span(&self, operation: &'static str, document: &Document) -> Span {
        let document = match document {
            // Every few seconds, and of no step's doing.
            Document::Alive => return Span::none(),
            Document::Initialising => "initialising",
            Document::Installation => "installation",
            Document::Keyring(_) => "keyring",
            Document::Notices => "notices",
            Document::Seen(_) | Document::SeenInstallation => "seen",
        };
        traces::store(self.0.kind(), operation, document)
    }
}

async fn within<T>(span: Span, call: impl Future<Output = Result<T, StoreError>> + Send) -> Result<T, StoreError> {
    let result = call.instrument(span.clone()).await;
    if result.is_err() {
        traces::failed(&span);
    }
    result
}

#[async_trait]
impl Store for TracedStore {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn place(&self) -> Option<String> {
        self.0.place()
    }

    fn locate(&self, document: &Document) -> String {
        self.0.locate(document)
    }

    async fn read(&self, document: &Document) -> Result<Option<Vec<u8>>, StoreError> {
        within(self.span("read", document), self.0.read(document)).await
    }

    async fn replace(&self, document: &Document, expected: Option<Digest>, bytes: &[u8]) -> Result<(), StoreError> {
        within(self.span("replace", document), self.0.replace(document, expected, bytes)).await
    }

    async fn remove(&self, document: &Document) -> Result<(), StoreError> {
        within(self.span("remove", document), self.0.remove(document)).await
    }

    async fn keysets(&self) -> Result<Vec<Name>, StoreError> {
        self.0.keysets().await
    }

    async fn keep(&self, document: &Document, bytes: &[u8]) -> Result<(), StoreError> {
        within(self.span("keep", document), self.0.keep(document, bytes)).await
    }

    fn uses(&self, keyset: &Name) -> bool {
        self.0.uses(keyset)
    }

    fn shared(&self) -> Option<&dyn SharedStore> {
        self.0.shared()
    }
}
