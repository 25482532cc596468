//! Lists and watch events: JSON of the API server.

use std::{future::pending, mem};

use futures_util::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::{
    api_error::{ApiError, ErrorKind, Status},
    resource::{Parsed, Resource},
};

/// Change of the objects within the scope of a watch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ObjectEvent<T> {
    /// Complete list of the objects.
    Relist(Vec<T>),
    /// An object was created or changed.
    Apply(T),
    /// An object was deleted, or left the scope.
    Delete {
        /// UID of the pod, or name of the namespace.
        key: String,
    },
}

impl<T: Resource> ObjectEvent<T> {
    /// Parses a line of a watch. Returns `None` if it does not concern an object.
    pub fn from_line(json: &[u8], scope: &T::Scope) -> Result<Option<Self>, ErrorKind> {
        let event = WatchEvent::from_json(json).and_then(|event| event.into_event(scope));
        event.map(|(event, _)| event).map_err(|error| error.kind())
    }

    /// Parses a list of one page, and keeps the objects within the scope.
    pub fn from_list(json: &[u8], scope: &T::Scope) -> Result<Self, ErrorKind> {
        let page = Page::from_json(json).and_then(|page| page.into_parts(scope));
        page.map(|(objects, ..)| Self::Relist(objects)).map_err(|error| error.kind())
    }
}

/// Page of a list.
#[derive(Deserialize)]
#[serde(bound = "T: Resource")]
pub(super) struct Page<T: Resource> {
    metadata: ListMetadata,
    // Go writes null for an empty list.
    items: Option<Vec<T::Object>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    resource_version: Option<String>,
    r#continue: Option<String>,
}

impl<T: Resource> Page<T> {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })
    }

    /// Returns the objects within the scope, the resource version of the list, and the continue token of the next page if
    /// there is one.
    pub(super) fn into_parts(self, scope: &T::Scope) -> Result<(Vec<T>, String, Option<String>), ApiError> {
        let version = require_version(self.metadata.resource_version)?;
        let objects = self.items.into_iter().flatten().filter_map(|object| T::parse(object, scope).value);
        Ok((objects.collect(), version, self.metadata.r#continue.filter(|next| !next.is_empty())))
    }
}

fn require_version(version: Option<String>) -> Result<String, ApiError> {
    let version = version.filter(|version| !version.is_empty());
    version.ok_or(ApiError::Incomplete { what: "resourceVersion" })
}

/// Event of a watch.
#[derive(Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE", bound = "T: Resource")]
pub(super) enum WatchEvent<T: Resource> {
    Added(T::Object),
    Modified(T::Object),
    Deleted(T::Object),
    Bookmark(Bookmark),
    Error(Status),
}

#[derive(Deserialize)]
pub(super) struct Bookmark {
    metadata: ListMetadata,
}

impl<T: Resource> WatchEvent<T> {
    pub(super) fn from_json(json: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(json).map_err(|source| ApiError::Malformed { source })
    }

    /// Converts to an event about an object, if it is one, and the new resource version.
    pub(super) fn into_event(self, scope: &T::Scope) -> Result<(Option<ObjectEvent<T>>, String), ApiError> {
        let (object, is_deleted) = match self {
            Self::Added(object) | Self::Modified(object) => (object, false),
            Self::Deleted(object) => (object, true),
            Self::Bookmark(bookmark) => {
                return Ok((None, require_version(bookmark.metadata.resource_version)?));
            }
            Self::Error(status) => return Err(status.into_error(None)),
        };
        let Parsed { key, version, value } = T::parse(object, scope);
        let event = match value.filter(|_| !is_deleted) {
            Some(value) => ObjectEvent::Apply(value),
            None => ObjectEvent::Delete { key },
        };
        Ok((Some(event), require_version(version)?))
    }
}

/// Decodes responses and sends the events. Hides the kind of the objects, so that the binary contains the reflector once.
pub(super) trait Decode: Send {
    /// Begins a list. Drops the pages of an incomplete one.
    fn begin_list(&mut self);

    /// Adds a page to the list.
    fn add_page(&mut self, json: &[u8]) -> Result<AddedPage, ApiError>;

    /// Makes the list the next event.
    fn finish_list(&mut self);

    /// Makes a line of a watch the next event, if it concerns an object. Returns whether it does, and the new resource version.
    fn add_line(&mut self, json: &[u8]) -> Result<(bool, String), ApiError>;

    /// Sends the next event.
    fn send(&mut self) -> BoxFuture<'_, ()>;
}

/// State of a list after a page.
pub(super) struct AddedPage {
    /// Number of objects so far.
    pub(super) objects: usize,
    /// Resource version of the list.
    pub(super) version: String,
    /// Continue token of the next page, if there is one.
    pub(super) next: Option<String>,
}

/// Decoder of one kind of objects.
pub(super) struct Decoder<T: Resource> {
    scope: T::Scope,
    list: Vec<T>,
    next: Option<ObjectEvent<T>>,
    events: mpsc::Sender<ObjectEvent<T>>,
}

impl<T: Resource> Decoder<T> {
    pub(super) fn new(scope: T::Scope, events: mpsc::Sender<ObjectEvent<T>>) -> Self {
        Self { scope, list: Vec::new(), next: None, events }
    }
}

impl<T: Resource> Decode for Decoder<T> {
    fn begin_list(&mut self) {
        self.list = Vec::new();
    }

    fn add_page(&mut self, json: &[u8]) -> Result<AddedPage, ApiError> {
        let (objects, version, next) = Page::<T>::from_json(json)?.into_parts(&self.scope)?;
        self.list.extend(objects);
        Ok(AddedPage { objects: self.list.len(), version, next })
    }

    fn finish_list(&mut self) {
        self.next = Some(ObjectEvent::Relist(mem::take(&mut self.list)));
    }

    fn add_line(&mut self, json: &[u8]) -> Result<(bool, String), ApiError> {
        let (event, version) = WatchEvent::<T>::from_json(json)?.into_event(&self.scope)?;
        self.next = event;
        Ok((self.next.is_some(), version))
    }

    fn send(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let Some(event) = self.next.take() else { return };
            if self.events.send(event).await.is_err() {
                // The watcher was dropped, which ends the reflector's task.
                pending::<()>().await;
            }
        })
    }
}
