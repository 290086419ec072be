drop index locks_due;

create index locks_due on locks (ready_at) where lock_id is not null;
