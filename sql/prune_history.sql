-- Forget locks that ended long ago, the oldest first.
--   $1  days to remember      int
--   $2  how many at the most  int
-- Lock ids begin with the millisecond they were made at (RFC 9562, version 7), so the primary key leads to
-- the old ones and needs no index on the time beside it.
delete from history
where lock_id in (
    select lock_id
    from history
    where lock_id < (
            select (lpad(to_hex(floor(extract(epoch from since) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
            from (select clock_timestamp() - $1::int * interval '1 day' as since) as horizon
        )
        and ended_at < clock_timestamp() - $1::int * interval '1 day'
    order by lock_id
    limit $2::int
)
