//! The least IAM policies of deploy/aws, held against the calls that are made.
