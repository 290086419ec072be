-- Sessions and secrets of one-time codes that are sealed under another than the first key, in the order of users.
--   $1  user of the last one seen  uuid
--   $2  and its kind               text
--   $3  the first key              text
--   $4  how many                   int
select kind, user_id, key_id, sealed
from (
    select 'session' as kind, user_id, key_id, sealed
    from user_sessions
    union all
    select 'totp' as kind, user_id, key_id, sealed
    from user_codes
) as extras
where (user_id, kind) > ($1::uuid, $2::text)
    and key_id <> $3::text
order by user_id, kind
limit $4::int
