-- Tell the other replicas who waits here, and learn who waits there.
--   $1  this replica  uuid
--   $2  who waits here, the longest first  jsonb (null: nobody)
-- Ages and not times, so that no replica's clock counts. Rows that are being told anew are left alone.
with told as (
    insert into waiting (replica, queue)
    select $1::uuid, $2::jsonb
    where $2::jsonb is not null
    on conflict (replica) do update
    set told_at = clock_timestamp(),
        queue = excluded.queue
),
forgotten as (
    delete from waiting
    where replica in (
        select replica
        from waiting
        where (replica = $1::uuid and $2::jsonb is null)
            or (replica <> $1::uuid and told_at < clock_timestamp() - interval '3 seconds')
        for update skip locked
    )
)
select queue, extract(epoch from clock_timestamp() - told_at)::float8 as age
from waiting
where replica <> $1::uuid
    and told_at >= clock_timestamp() - interval '3 seconds'
