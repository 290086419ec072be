-- Replace what sessions and secrets of one-time codes are sealed as, each only while it is the one that was read.
--   $1  kinds     text[]  (session or totp)
--   $2  user ids  uuid[]
--   $3  old       bytea[]
--   $4  new       bytea[]
--   $5  key id    text: of the new ones
with resealed as materialized (
    select kind, user_id, old, new
    from unnest($1::text[], $2::uuid[], $3::bytea[], $4::bytea[]) as resealed (kind, user_id, old, new)
),
sessions as (
    update user_sessions
    set key_id = $5::text,
        sealed = resealed.new
    from resealed
    where resealed.kind = 'session'
        and user_sessions.user_id = resealed.user_id
        and user_sessions.sealed = resealed.old
    returning user_sessions.user_id
),
codes as (
    update user_codes
    set key_id = $5::text,
        sealed = resealed.new
    from resealed
    where resealed.kind = 'totp'
        and user_codes.user_id = resealed.user_id
        and user_codes.sealed = resealed.old
    returning user_codes.user_id
)
select user_id from sessions
union all
select user_id from codes
