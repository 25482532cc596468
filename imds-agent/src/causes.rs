//! Text of errors of libraries.

use std::error::Error;

/// Returns the text of an error and of its causes. Skips a cause whose text is already included, because libraries
/// repeat their causes.
pub(crate) fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_causes_are_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error("{text}")]
        struct Link {
            text: &'static str,
            source: Option<Box<Self>>,
        }
        let refused = Link { text: "connection refused", source: None };
        let connect = Link { text: "client error (Connect)", source: Some(Box::new(refused)) };
        let again = Link { text: "client error (Connect)", source: Some(Box::new(connect)) };
        let service = Link { text: "ServiceError: client error (Connect)", source: Some(Box::new(again)) };
        assert_eq!(with_causes(&service), "ServiceError: client error (Connect): connection refused");
    }
}
