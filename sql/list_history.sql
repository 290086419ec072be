-- The locks of a user, newest first, the current one among them.
--   $1  user id  uuid
--   $2  fence of the lock before the page (exclusive)
--   $3  how many
select *
from (
    select fence, holder, note, acquired_at,
        case when expires_at <= statement_timestamp() then expires_at end as ended_at,
        case when expires_at <= statement_timestamp() then 'expired' end as ended_by,
        null as outcome
    from locks
    where user_id = $1::uuid
        and lock_id is not null
    union all
    select fence, holder, note, acquired_at, ended_at, ended_by, outcome
    from history
    where user_id = $1::uuid
) as recorded
where fence < $2::bigint
order by fence desc
limit $3::int
