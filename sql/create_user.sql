-- Make a user and its lock, and its pool where that is new.
--   $1 id  $2 login  $3 secret  $4 project_id  $5 env  $6 domain  $7 labels
--   $8 key id  $9 sealed  $10 period  of its one-time codes (null: none)
-- The user comes back, as get_user.sql tells it; no row when the login is taken. `do update` is there to return the
-- pool that another call has made in this moment; it runs only then.
with new_pool as (
    insert into pools (project_id, env, domain)
    select $4::uuid, $5::text, $6::text
    where not exists (select from pools where project_id = $4::uuid and env = $5::text and domain = $6::text)
    on conflict (project_id, env, domain) do update set env = excluded.env
    returning id
),
created as (
    insert into users (id, login, secret, project_id, env, domain, labels)
    values ($1::uuid, $2::text, $3::text, $4::uuid, $5::text, $6::text, $7::jsonb)
    on conflict (project_id, env, login) do nothing
    returning id, created_at, login, project_id, env, domain, labels
),
unlocked as (
    insert into locks (user_id, pool_id)
    select created.id, pool.id
    from created
    cross join (
        select id from pools where project_id = $4::uuid and env = $5::text and domain = $6::text
        union
        select id from new_pool
    ) as pool
    returning user_id, holder, fence, acquired_at, expires_at, quarantine, note
),
with_codes as (
    insert into user_codes (user_id, key_id, sealed, period)
    select id, $8::text, $9::bytea, $10::int
    from created
    where $9::bytea is not null
    returning user_id
)
select created.id, created.created_at, created.login, created.project_id, created.env, created.domain, created.labels,
    'free' as state, unlocked.holder, unlocked.fence, unlocked.acquired_at, unlocked.expires_at, unlocked.quarantine,
    unlocked.note, false as has_session, with_codes.user_id is not null as has_totp
from created
join unlocked on unlocked.user_id = created.id
left join with_codes on with_codes.user_id = created.id
