//! Kinds of API objects that the agent lists and watches.

use serde::de::DeserializeOwned;

/// Kind of API objects that a [`Watcher`](super::Watcher) follows. A value is the part of an object that the agent needs.
pub trait Resource: Sized + Send + 'static {
    /// JSON form of an object.
    type Object: DeserializeOwned + Send;
    /// Selects the objects, and the parts of them, that the agent needs.
    type Scope: Send;

    /// URL path of the objects.
    const PATH: &'static str;
    /// Name of the kind in texts.
    const KIND: &'static str;
    /// Name of all objects within the scope in texts.
    const ALL: &'static str;
    /// Upper bound of the known objects.
    const MAX: usize;
    /// True if the agent needs only the metadata of the objects. A server that can leave out the rest does so.
    const METADATA_ONLY: bool;
    /// Text that completes an error if the API server denies requests.
    const IF_FORBIDDEN: &'static str;

    /// Returns the field selector of the requests.
    fn field_selector(scope: &Self::Scope) -> Option<String>;

    /// Converts an object.
    fn parse(object: Self::Object, scope: &Self::Scope) -> Parsed<Self>;
}

/// Object of the API, as far as the agent needs it.
#[derive(Debug)]
pub struct Parsed<T> {
    /// Key of the object, which [`ObjectEvent::Delete`](super::ObjectEvent::Delete) names.
    pub key: String,
    /// Resource version of the object.
    pub version: Option<String>,
    /// The object, or `None` if it is out of scope.
    pub value: Option<T>,
}

/// Objects to which requests apply: the constants of a [`Resource`], and its field selector.
pub(super) struct Collection {
    pub(super) path: &'static str,
    pub(super) kind: &'static str,
    pub(super) all: &'static str,
    pub(super) max: usize,
    pub(super) metadata_only: bool,
    pub(super) if_forbidden: &'static str,
    pub(super) field_selector: Option<String>,
}

impl Collection {
    pub(super) fn new<T: Resource>(scope: &T::Scope) -> Self {
        Self {
            path: T::PATH,
            kind: T::KIND,
            all: T::ALL,
            max: T::MAX,
            metadata_only: T::METADATA_ONLY,
            if_forbidden: T::IF_FORBIDDEN,
            field_selector: T::field_selector(scope),
        }
    }
}
