-- Tell the other replicas that users may have come free, or that somebody waits.
--   $1  what  text
-- A statement of its own, because a notification within a transaction takes one lock for the whole server.
select pg_notify('botfarm', $1::text)
