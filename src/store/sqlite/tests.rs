//! What only a SQLite file can get wrong; what any store must do is in `testing::store`.
