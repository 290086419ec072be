drop view lock_states;

drop table idempotency_keys;

drop table history;

drop table locks;
