drop view free_users;

drop view lock_states;

drop table user_codes;

drop table user_sessions;

drop index locks_with_session;

drop index locks_failing;

alter table history drop column outcome, drop column note;

alter table locks drop column session_until, drop column last_outcome, drop column bad_logins, drop column note;

create view lock_states as
select
    locks.*,
    case
        when lock_id is not null and expires_at > statement_timestamp() then 'locked'
        when quarantine is not null then 'quarantined'
        when ready_at > statement_timestamp() then 'resting'
        else 'free'
    end as state
from locks;

create view free_users as
select ctid as place, user_id, pool_id, fence, ready_at, lock_id, client_id, holder, acquired_at, expires_at
from locks
where quarantine is null
    and ready_at <= (select clock_timestamp())
    and (lock_id is null or expires_at <= clock_timestamp());
