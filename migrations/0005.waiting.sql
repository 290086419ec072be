-- Who waits where, so that no replica serves newcomers before somebody who waits longer at another one.
-- One row a replica that has waiters, told anew every second; one that is silent for three seconds is gone.
create table waiting (
    replica uuid primary key,
    told_at timestamptz not null default clock_timestamp(),
    -- The longest waiting, one for each distinct wish: [{"age": seconds, "wishes": [{...}]}].
    queue jsonb not null,
    constraint "a queue is a list" check (jsonb_typeof(queue) = 'array')
) with (
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);
