//! The fields of `portcullis.v1` messages that are counted before a message is decoded.
//!
//! Look next at `api/message_scanner.rs`, which counts them.

use crate::api::message_scanner::{FieldLimit, FieldRule, MessageShape};
use crate::model::limits::{BATCH_CALL_BYTES, BATCH_CALLS_MAX, CHAIN_TOKENS_READ_MAX, LIST_TOOLS_MAX, LISTED_TOOL_BYTES};

static PRESENTATION_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule {
        number: 1,
        limit: Some(FieldLimit { counter: 0, name: "presentation.aat_chain", count_max: CHAIN_TOKENS_READ_MAX, each_bytes: 0 }),
        message_shape: None,
        resets_counter: None,
    }],
};

/// `CheckRequest`.
pub(in crate::api) static CHECK_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule { number: 2, limit: None, message_shape: Some(&PRESENTATION_SHAPE), resets_counter: None }],
};

/// `CheckBatchRequest`.
pub(in crate::api) static CHECK_BATCH_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[FieldRule {
        number: 1,
        limit: Some(FieldLimit { counter: 1, name: "requests", count_max: BATCH_CALLS_MAX, each_bytes: BATCH_CALL_BYTES }),
        message_shape: Some(&CHECK_REQUEST_SHAPE),
        resets_counter: Some(0),
    }],
};

/// `ListToolsRequest`.
pub(in crate::api) static LIST_TOOLS_REQUEST_SHAPE: MessageShape = MessageShape {
    fields: &[
        FieldRule { number: 1, limit: None, message_shape: Some(&PRESENTATION_SHAPE), resets_counter: None },
        FieldRule {
            number: 3,
            limit: Some(FieldLimit { counter: 1, name: "tools", count_max: LIST_TOOLS_MAX, each_bytes: LISTED_TOOL_BYTES }),
            message_shape: None,
            resets_counter: None,
        },
    ],
};
