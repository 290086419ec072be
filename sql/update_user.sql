-- Change a user; a current lock stays. A session ends with a new login or password.
--   $1 id  $2 login  $3 secret  $4 domain  $5 labels  (null leaves a value as it is)
--   $6  whether its one-time codes change  boolean
--   $7 key id  $8 sealed  $9 period  of these (null: it has none any more)
-- A user of another domain belongs to another pool, so its lock row moves in the same statement. Two calls take turns
-- at the user, and the second sees all else as it was before the first: so no condition below asks what was there then.
-- What has changed comes back; a password that is given counts, though it may be the same.
with before as materialized (
    select *
    from users
    where id = $1::uuid
    for update
),
changed as (
    update users
    set login = coalesce($2::text, before.login),
        secret = coalesce($3::text, before.secret),
        domain = coalesce($4::text, before.domain),
        labels = coalesce($5::jsonb, before.labels)
    from before
    where users.id = before.id
    returning users.id, users.project_id, users.env, users.domain, array_remove(array[
        case when users.login <> before.login then 'login' end,
        case when users.secret <> before.secret then 'password' end,
        case when users.domain <> before.domain then 'domain' end,
        case when users.labels <> before.labels then 'labels' end,
        case when $6::boolean then 'totp' end
    ], null) as names
),
new_pool as (
    insert into pools (project_id, env, domain)
    select project_id, env, domain
    from changed
    where not exists (
        select
        from pools
        where (project_id, env, domain) = (changed.project_id, changed.env, changed.domain)
    )
    on conflict (project_id, env, domain) do update set env = excluded.env
    returning id
),
with_codes as (
    insert into user_codes (user_id, key_id, sealed, period)
    select id, $7::text, $8::bytea, coalesce($9::int, 30)
    from changed
    where $6::boolean
    on conflict (user_id) do update
    set key_id = excluded.key_id,
        sealed = excluded.sealed,
        period = coalesce($9::int, user_codes.period)
),
moved as (
    update locks
    set pool_id = pool.id,
        ready_at = case
            when lock_id is null and pool_id <> pool.id then greatest(ready_at, clock_timestamp())
            else ready_at
        end,
        session_until = case when changed.names && array['login', 'password'] then null else session_until end
    from changed
    cross join (
        select pools.id
        from pools
        join changed using (project_id, env, domain)
        union
        select id from new_pool
    ) as pool
    where locks.user_id = $1::uuid
        and ($4::text is not null or changed.names && array['login', 'password'])
)
select names
from changed
